"""The TCP option as its socket calls show it, without a kernel program.

Connections are real; who opted in is remembered here, and what a middlebox takes away
is said by the test. As strict as the real one: whoever asks too late gets EPERM, and
there is an answer only for sockets of a process that the option is installed for.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pysmc.discovery.option import sockets
from pysmc.discovery.option.sockets import OptionState

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

TCP_CLOSE, TCP_LISTEN = 7, 10
LISTENING = "0A"
STATE = OptionState


def tcp_state(sock: Any) -> int:
    """Give the state of a TCP socket, as the kernel numbers them."""
    info: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return info[0]


def plain(address: Any) -> tuple[str, int]:
    """Bring an address into the form that both ends have."""
    host = address[0].removeprefix("::ffff:")
    return host, address[1]


class FakeOption:
    """Stands in for `pysmc.discovery.option.sockets`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_here = True
        """Whether it is installed for sockets that are made now."""
        self.elsewhere: set[Any] = set()
        """Inodes of sockets that were made in another cgroup."""
        self.stripped = ""
        """Where a middlebox takes the option away: "SYN", "SYN-ACK" or nowhere."""
        self.cookies = False
        """Whether the server sends SYN cookies."""
        self.in_doubt = False
        """Whether the kernel knows no more whether a client was answered."""
        self.is_complete = True
        """Whether the part is installed that sees the handshakes."""
        self.calls: list[str] = []
        """Every system call that the real one would make."""
        self._opted: set[int] = set()
        self._clients: set[tuple[str, int]] = set()
        for name in ("opt_in", "opt_out", "read_state", "is_installed"):
            monkeypatch.setattr(sockets, name, getattr(self, name))

    @staticmethod
    def _key(sock: Any) -> int:
        return os.fstat(sock.fileno()).st_ino

    def _reaches(self, sock: Any) -> bool:
        return self.is_here and self._key(sock) not in self.elsewhere

    def is_installed(self) -> bool:
        self.calls.append("look")
        return self.is_here

    def opt_in(self, sock: Any) -> bool:
        self.calls.append("opt in")
        if not self._reaches(sock):
            return False
        if tcp_state(sock) != TCP_CLOSE:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        self._opted.add(self._key(sock))
        return True

    def opt_out(self, sock: Any) -> None:
        self.calls.append("opt out")
        if tcp_state(sock) != TCP_CLOSE:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        self._opted.discard(self._key(sock))

    def read_state(self, sock: Any) -> OptionState | None:
        self.calls.append("read")
        if not self._reaches(sock):
            return None
        key = self._key(sock)
        state = tcp_state(sock)
        if state in {TCP_CLOSE, TCP_LISTEN}:
            return STATE.WANT if key in self._opted else STATE(0)
        if key in self._opted:
            return self._client(sock)
        return self._server(sock)

    def _done(self) -> OptionState:
        return STATE.WANT | (STATE.DONE if self.is_complete else STATE(0))

    def _client(self, sock: Any) -> OptionState:
        self._clients.add(plain(sock.getsockname()))
        answered = self._listens(plain(sock.getpeername())[1]) and self.is_complete
        seen = answered and not self.stripped and not self.cookies
        return self._done() | (STATE.PEER if seen else STATE(0))

    def _server(self, sock: Any) -> OptionState:
        if not self._listens(plain(sock.getsockname())[1]):
            return STATE(0)
        state = self._done() | STATE.SERVER
        if self.cookies:
            return state | STATE.NOSYN
        # A client whose connect() has just ended may not have asked yet.
        senders = self._clients | {address for _, address in self._rows(listen=False)}
        shown = plain(sock.getpeername()) in senders
        seen = shown and self.stripped != "SYN" and self.is_complete
        peer = STATE.MAYBE if self.in_doubt else STATE.PEER
        return state | (peer if seen else STATE(0))

    def _listens(self, port: int) -> bool:
        """Tell whether a listener of this port opted in."""
        return any(port == found for _, (_, found) in self._rows(listen=True))

    def _rows(self, *, listen: bool) -> Iterator[tuple[int, tuple[str, int]]]:
        """Give inode and address of the sockets that opted in, from the kernel."""
        for name in ("tcp", "tcp6"):
            lines = Path(f"/proc/self/net/{name}").read_text("ascii").splitlines()
            for words in (line.split() for line in lines[1:]):
                inode = int(words[9])
                if inode in self._opted and (words[3] == LISTENING) is listen:
                    yield inode, _address(words[1])


def _address(text: str) -> tuple[str, int]:
    """Read an address of the kernel's table."""
    host, port = text.split(":")
    raw = b"".join(
        int(host[i : i + 8], 16).to_bytes(4, "little") for i in range(0, len(host), 8)
    )
    family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
    return plain((socket.inet_ntop(family, raw), int(port, 16)))
