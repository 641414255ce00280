"""Whether it works here, and if not, why not; the real thing is in `real_setups`."""

from __future__ import annotations

import errno
import socket

import pytest

from pysmc.discovery.option import trial
from pysmc.discovery.option.cgroup import NoCgroupError
from pysmc.discovery.option.sockets import OptionState
from pysmc.discovery.option.trial import Trial, judge, try_option

BOTH = OptionState.WANT | OptionState.PEER | OptionState.DONE
PLAIN = OptionState.WANT | OptionState.DONE
SERVER = OptionState.SERVER


@pytest.mark.parametrize(
    ("client", "server", "words"),
    [
        (BOTH, BOTH | SERVER, ""),
        (None, BOTH, "incomplete"),
        (BOTH, None, "incomplete"),
        (OptionState.WANT, OptionState.WANT, "sock_ops program did not run"),
        (PLAIN, PLAIN | SERVER | OptionState.NOSYN, "tcp_syncookies"),
        (PLAIN, PLAIN | SERVER, "packet filter"),
        (PLAIN, BOTH | SERVER, "packet filter"),
    ],
)
def test_what_two_states_say(client, server, words):
    if words:
        assert words in judge(client, server)
    else:
        assert judge(client, server) == ""


@pytest.fixture
def installed(monkeypatch):
    """A kernel in which sockets are answered so."""

    def install(abi, states=(BOTH, BOTH | SERVER)):
        answers = list(states)
        monkeypatch.setattr(trial, "installed_abi", lambda: abi)
        monkeypatch.setattr(trial, "opt_in", lambda sock: True)
        monkeypatch.setattr(trial, "read_state", lambda sock: answers.pop(0))

    return install


def test_it_works(installed):
    installed(1)
    assert try_option() == Trial(1, works=True, reason="")


def test_it_does_not(installed):
    installed(1, (PLAIN, PLAIN | SERVER))
    found = try_option()
    assert not found.works
    assert "lost on loopback" in found.reason


def test_not_installed(installed, monkeypatch):
    installed(None)
    assert "No programs are installed for" in try_option().reason

    def nowhere():
        raise NoCgroupError

    monkeypatch.setattr(trial, "own_cgroup", nowhere)
    assert try_option().reason == "No programs are installed for this process."


def test_another_version(installed):
    installed(2)
    found = try_option()
    assert (found.abi, found.works) == (2, False)
    assert "Version 2 is installed" in found.reason


@pytest.mark.parametrize(
    ("number", "works"), [(errno.ENETUNREACH, True), (errno.ECONNREFUSED, False)]
)
def test_no_connection(installed, monkeypatch, number, works):
    installed(1)

    def fail(self, address):
        raise OSError(number, "no way")

    monkeypatch.setattr(socket.socket, "connect", fail)
    found = try_option()
    assert found.works is works
    assert ("no way" in found.reason) is not works
