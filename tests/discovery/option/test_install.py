"""Attach, find and detach, with a fake kernel behind bpf(2)."""

from __future__ import annotations

import errno
import os

import pytest

from pysmc.discovery.option import install
from pysmc.discovery.option.bpf import BpfError
from pysmc.discovery.option.machine import Machine
from tests.discovery.option.fake_bpf import BPF, NET_ADMIN, FakeBpf

NAMES = ["pysmc1_getopt", "pysmc1_setopt", "pysmc1_sock_ops"]
OLDER = Machine("x86_64", 64, "little", 8192)
"""Its pages are longer: two of the three programs are others then."""


def attach(cgroup, bpf, machine=None):
    return install.attach(cgroup, bpf=bpf, machine=machine)


def has_notes(cgroup):
    """Whether this file system keeps the note, an attribute of a user's."""
    try:
        os.getxattr(cgroup, install.NOTE)
    except OSError:
        return False
    return True


def test_attach_and_detach(fake, bpf, cgroup):
    done = attach(cgroup, bpf)
    assert done == install.Attached(cgroup, is_new=True, replaced=0, foreign=())
    assert fake.names_at(cgroup) == NAMES
    found = install.find(cgroup, bpf=bpf)
    assert [one.part.name for one in found] == ["sock_ops", "getsockopt", "setsockopt"]
    assert {one.abi for one in found} == {1}
    assert install.detach(cgroup, bpf=bpf) == 3
    assert fake.names_at(cgroup) == []
    assert install.detach(cgroup, bpf=bpf) == 0
    assert not has_notes(cgroup)


def test_the_one_that_takes_the_opt_in_comes_last_and_goes_first(fake, bpf, cgroup):
    attach(cgroup, bpf)
    install.detach(cgroup, bpf=bpf)
    setsockopt = 22
    assert len(fake.moves) == 6
    assert fake.moves[2:4] == [("attach", setsockopt), ("detach", setsockopt)]


def test_a_second_time_nothing_happens(fake, bpf, cgroup):
    attach(cgroup, bpf)
    before = install.find(cgroup, bpf=bpf)
    assert not attach(cgroup, bpf).is_new
    assert [one.id for one in install.find(cgroup, bpf=bpf)] == [o.id for o in before]
    assert fake.calls.count("PROG_ATTACH") == 3


def test_other_programs_of_ours_are_replaced(fake, bpf, cgroup):
    attach(cgroup, bpf, OLDER)
    done = attach(cgroup, bpf)
    assert (done.is_new, done.replaced) == (True, 3)
    assert fake.names_at(cgroup) == NAMES


def test_programs_of_others_stay_and_are_told(fake, bpf, cgroup, tmp_path):
    fake.parents[os.stat(cgroup).st_ino] = os.stat(tmp_path).st_ino
    near = fake.attach_foreign(cgroup, "tuner")
    far = fake.attach_foreign(tmp_path, "pysmc_like_not")
    # Ours in the parent is none of others.
    install.attach(tmp_path, bpf=bpf)
    done = attach(cgroup, bpf)
    assert done.foreign == (
        install.Foreign(near, "tuner"),
        install.Foreign(far, "pysmc_like_not"),
    )
    assert str(done.foreign[0]) == f"tuner (id {near})"
    assert str(install.Foreign(7, "")) == "without a name (id 7)"
    install.detach(cgroup, bpf=bpf)
    assert fake.names_at(cgroup) == ["tuner"]


def test_who_answers_goes_last(fake, bpf, cgroup):
    """A client that was shown the option must not be taken for a plain one."""
    attach(cgroup, bpf, OLDER)
    fake.moves.clear()
    attach(cgroup, bpf)
    install.detach(cgroup, bpf=bpf)
    gone = [place for move, place in fake.moves if move == "detach"]
    assert gone == [22, 3, 21] * 2, "setsockopt, sock_ops, getsockopt"


@pytest.mark.parametrize("step", range(3))
def test_all_or_nothing(fake, bpf, cgroup, step):
    fake.fails["PROG_ATTACH"] = [None] * step + [errno.EPERM]
    with pytest.raises(BpfError, match="attach to the cgroup .*EPERM"):
        attach(cgroup, bpf)
    assert fake.names_at(cgroup) == []


@pytest.mark.parametrize("command", ["BTF_LOAD", "MAP_CREATE", "PROG_LOAD"])
def test_a_step_that_fails_leaves_what_was_there(fake, bpf, cgroup, command):
    attach(cgroup, bpf, OLDER)
    fake.fails[command] = [errno.ENOMEM]
    with pytest.raises(BpfError, match="ENOMEM"):
        attach(cgroup, bpf)
    assert fake.names_at(cgroup) == NAMES


def test_what_goes_meanwhile_is_no_fault(fake, bpf, cgroup):
    attach(cgroup, bpf)
    fake.fails["PROG_GET_FD_BY_ID"] = [errno.ENOENT]
    assert len(install.find(cgroup, bpf=bpf)) == 2
    fake.fails["PROG_DETACH"] = [errno.ENOENT]
    assert install.detach(cgroup, bpf=bpf) == 3
    assert fake.names_at(cgroup) == ["pysmc1_setopt"]


def test_other_errors_are_told(fake, bpf, cgroup):
    attach(cgroup, bpf)
    for command, act in (
        ("PROG_GET_FD_BY_ID", install.find),
        ("PROG_QUERY", install.find),
        ("PROG_DETACH", install.detach),
    ):
        fake.fails[command] = [errno.EINVAL]
        with pytest.raises(BpfError, match="EINVAL"):
            act(cgroup, bpf=bpf)


def test_no_directory(bpf, tmp_path):
    with pytest.raises(FileNotFoundError):
        attach(tmp_path / "nowhere", bpf)


def test_every_cgroup_is_looked_at(fake, bpf, cgroup, tmp_path, monkeypatch):
    below = cgroup / "below"
    below.mkdir()
    monkeypatch.setattr(install, "mount_point", lambda: tmp_path)
    attach(below, bpf)
    install.attach(bpf=bpf)
    found = install.find_all(bpf=bpf)
    assert [one.cgroup for one in found] == [tmp_path] * 3 + [below] * 3
    assert install.detach(bpf=bpf) == 3
    assert len(install.find_all(bpf=bpf)) == 3


def test_a_cgroup_that_goes_meanwhile(fake, bpf, cgroup, tmp_path, monkeypatch):
    attach(cgroup, bpf)
    monkeypatch.setattr(
        os, "walk", lambda top: [(str(top), [], []), ("/nowhere", [], [])]
    )
    assert len(install.find_all(bpf=bpf, top=cgroup)) == 3


# --- with the two capabilities that suffice ------------------------------------------


@pytest.fixture
def limited(fake):
    """The kernel does not show the names of programs."""
    fake.capabilities = BPF | NET_ADMIN
    return fake


def test_two_capabilities_suffice(limited, bpf, cgroup, notes):
    assert attach(cgroup, bpf).is_new
    assert not attach(cgroup, bpf).is_new
    assert [one.part.name for one in install.find(cgroup, bpf=bpf)] == [
        "sock_ops", "getsockopt", "setsockopt",
    ]  # fmt: skip


def test_not_to_take_away(limited, bpf, cgroup, notes):
    attach(cgroup, bpf, OLDER)
    for act in (attach, lambda cgroup, bpf: install.detach(cgroup, bpf=bpf)):
        with pytest.raises(BpfError, match="take program .* away .*EPERM") as caught:
            act(cgroup, bpf)
        assert caught.value.needs.name == "SYS_ADMIN"
    assert limited.names_at(cgroup) == NAMES


def test_without_a_note_they_are_attached_once_more(limited, bpf, cgroup, notes):
    """Which is harmless: several instances behave like one."""
    attach(cgroup, bpf)
    notes.clear()
    done = attach(cgroup, bpf)
    assert done.is_new
    assert [one.name for one in done.foreign] == [""]
    assert limited.names_at(cgroup) == sorted(NAMES * 2)


def test_what_was_just_attached_is_none_of_others(limited, bpf, cgroup, monkeypatch):
    def refused(*_):
        raise OSError(errno.EACCES, "no")

    monkeypatch.setattr(os, "setxattr", refused)
    assert attach(cgroup, bpf).foreign == ()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"pysmc1_sock_ops",
        b"pysmc1_sock_ops x 0011223344556677",
        b"other_sock_ops 4 0011223344556677",
        b"pysmc1_sock_ops 999 0011223344556677",
        b"pysmc1_setopt 4 0011223344556677",
    ],
)
def test_a_note_that_is_nonsense_is_ignored(limited, bpf, cgroup, notes, text):
    attach(cgroup, bpf)
    notes[cgroup] = text
    assert install.find(cgroup, bpf=bpf) == ()


@pytest.fixture
def notes(monkeypatch):
    """Extended attributes: the file system of a test may have none."""
    kept: dict[object, bytes] = {}

    def get(path, name):
        assert name == install.NOTE
        try:
            return kept[path]
        except KeyError:
            raise OSError(errno.ENODATA, "No data available") from None

    def put(path, name, value):
        assert name == install.NOTE
        kept[path] = value

    monkeypatch.setattr(os, "getxattr", get)
    monkeypatch.setattr(os, "setxattr", put)
    return kept


def test_a_file_system_without_attributes(fake, bpf, cgroup, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for name in ("setxattr", "removexattr"):
        monkeypatch.setattr(os, name, refuse)
    assert attach(cgroup, bpf).is_new
    assert install.detach(cgroup, bpf=bpf) == 3


def test_fakes_do_not_mix(cgroup):
    """The fake refuses what it does not know, as a kernel does."""
    with pytest.raises(KeyError):
        FakeBpf()(4, bytearray())
