"""Programs in a BPF file system, for somebody else to attach."""

from __future__ import annotations

import errno
import os

import pytest

from pysmc.discovery.option.bpf import BpfError
from pysmc.discovery.option.machine import Machine
from pysmc.discovery.option.pins import pin, unpin

NAMES = ["getsockopt", "setsockopt", "sock_ops"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_pin_and_unpin(bpf, tmp_path):
    folder = tmp_path / "smc"
    assert pin(folder, bpf=bpf)
    assert names(folder) == NAMES
    assert unpin(folder) == 3
    assert not folder.exists()
    assert unpin(folder) == 0


def test_a_second_time_nothing_happens(fake, bpf, tmp_path):
    assert pin(tmp_path, bpf=bpf)
    assert not pin(tmp_path, bpf=bpf)
    assert fake.calls.count("OBJ_PIN") == 3


def test_others_are_replaced(fake, bpf, tmp_path):
    assert pin(tmp_path, bpf=bpf, machine=Machine("x86_64", 64, "little", 8192))
    (tmp_path / "somebody_elses").touch()
    assert pin(tmp_path, bpf=bpf)
    assert names(tmp_path) == [*NAMES, "somebody_elses"]
    assert unpin(tmp_path) == 3
    assert names(tmp_path) == ["somebody_elses"]


@pytest.mark.parametrize("step", range(3))
def test_all_or_nothing(fake, bpf, tmp_path, step):
    fake.fails["OBJ_PIN"] = [None] * step + [errno.EPERM]
    with pytest.raises(BpfError, match="pin the program as .*EPERM"):
        pin(tmp_path / "smc", bpf=bpf)
    assert names(tmp_path) == []


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o1777])
def test_a_folder_that_others_can_change(fake, bpf, tmp_path, mode):
    folder = tmp_path / "smc"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(PermissionError, match="others could change the programs"):
        pin(folder, bpf=bpf)
    assert names(folder) == fake.calls == []


@pytest.mark.parametrize(("owner", "is_good"), [(0, True), (7, False), (1234, True)])
def test_a_folder_of_somebody_else(bpf, tmp_path, monkeypatch, owner, is_good):
    real = type(tmp_path).stat

    def stat(path, **options):
        found = list(real(path, **options))
        found[4] = owner
        return os.stat_result(found)

    monkeypatch.setattr(type(tmp_path), "stat", stat)
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    if is_good:
        assert pin(tmp_path, bpf=bpf)
        return
    with pytest.raises(PermissionError, match="others could change the programs"):
        pin(tmp_path, bpf=bpf)
    assert names(tmp_path) == []


def test_no_folder_above(bpf, tmp_path):
    with pytest.raises(FileNotFoundError):
        pin(tmp_path / "nowhere" / "smc", bpf=bpf)
