"""Opt-in and result as a socket sees them, with and without programs."""

from __future__ import annotations

import errno
import socket

import pytest

from pysmc.discovery.option import sockets
from pysmc.discovery.option.sockets import (
    OptionState,
    opt_in,
    opt_out,
    read_state,
)


class Socket:
    """A socket whose options are answered by programs, or not."""

    def __init__(self, error: int = 0, value: int = 0) -> None:
        self.error, self.value = error, value
        self.asked: list[tuple[int, ...]] = []

    def setsockopt(self, *arguments: int) -> None:
        self.asked.append(arguments)
        self._fail()

    def getsockopt(self, *arguments: int) -> int:
        self.asked.append(arguments)
        self._fail()
        return self.value

    def _fail(self) -> None:
        if self.error:
            raise OSError(self.error, "no")

    def __enter__(self):
        return self

    def __exit__(self, *reason):
        return None


NOT_THERE = [errno.ENOPROTOOPT, errno.EOPNOTSUPP]


def test_one_call_each():
    sock = Socket(value=39)
    assert opt_in(sock)  # type: ignore[arg-type]
    found = read_state(sock)  # type: ignore[arg-type]
    assert found == OptionState(39)
    assert sock.asked == [(0x534D4352, 1, 1), (0x534D4352, 1)]
    assert str(found) == "39"
    assert repr(found) == "<OptionState.WANT|PEER|DONE|SERVER: 39>"


def test_an_opt_in_can_be_taken_back():
    sock = Socket()
    opt_out(sock)  # type: ignore[arg-type]
    assert sock.asked == [(0x534D4352, 1, 0)]
    with pytest.raises(OSError, match="no"):
        opt_out(Socket(errno.ENOPROTOOPT))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", NOT_THERE)
def test_not_installed(number, monkeypatch):
    sock = Socket(number)
    assert not opt_in(sock)  # type: ignore[arg-type]
    assert read_state(sock) is None  # type: ignore[arg-type]
    monkeypatch.setattr(socket, "socket", lambda *_: sock)
    assert sockets.installed_abi() is None
    assert not sockets.is_installed()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBADF])
def test_other_errors_are_told(number, monkeypatch):
    sock = Socket(number)
    monkeypatch.setattr(socket, "socket", lambda *_: sock)
    for act in (lambda: opt_in(sock), lambda: read_state(sock), sockets.installed_abi):  # type: ignore[arg-type]
        with pytest.raises(OSError, match="no") as caught:
            act()
        assert caught.value.errno == number


@pytest.mark.parametrize(("value", "expected"), [(1, True), (2, False)])
def test_the_version(value, expected, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_: Socket(value=value))
    assert sockets.installed_abi() == value
    assert sockets.is_installed() is expected


def test_a_plain_socket_of_this_process_can_be_asked():
    with socket.socket() as sock:
        asked = opt_in(sock)
        assert (read_state(sock) is not None) == asked == sockets.is_installed()
    with pytest.raises(OSError, match="Bad file descriptor"):
        opt_in(sock)
