"""A peer that takes one connection and answers a Proposal, as it is told to."""

from __future__ import annotations

import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from smcproto import clc
from smcproto.constants import OsType

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "ACCEPT",
    "PATIENCE",
    "RELEASE_0",
    "REUSED",
    "SMC_D",
    "UEID",
    "VERSION_1",
    "Peer",
    "declined",
    "read",
]

PATIENCE = 10.0
UEID = "PROD.EAST"
PEER_ID = bytes.fromhex("abcd02005e005302")

ACCEPT = clc.Accept(
    version=2,
    first_contact=True,
    peer_id=PEER_ID,
    gid=bytes(10) + b"\xff\xff\x0a\0\0\x01",
    mac=PEER_ID[2:],
    qp_number=0x222,
    rkey=0x22222202,
    rmbe_index=1,
    alert_token=0x202,
    rmbe_size_code=2,
    mtu_code=3,
    virtual_address=0x7F2222200000,
    psn=0x0D0E0F,
    v2=clc.AcceptExtension(
        eid=UEID,
        first_contact=clc.FirstContactExtension(
            direct=True,
            os_type=OsType.LINUX,
            release=1,
            host_name="server",
            max_connections=255,
            max_links=2,
        ),
    ),
)
assert ACCEPT.v2 is not None
assert ACCEPT.v2.first_contact is not None
RELEASE_0 = replace(
    ACCEPT,
    v2=replace(
        ACCEPT.v2,
        first_contact=replace(
            ACCEPT.v2.first_contact, release=0, max_connections=0, max_links=0
        ),
    ),
)
REUSED = replace(
    ACCEPT, first_contact=False, v2=clc.AcceptExtension(eid=UEID, first_contact=None)
)
VERSION_1 = replace(ACCEPT, version=1, v2=None)
SMC_D = clc.SmcdAccept(
    version=1,
    first_contact=False,
    gid=7,
    token=8,
    dmbe_index=1,
    dmbe_size_code=2,
    link_id=9,
)


def declined(version: int, code: int) -> clc.Decline:
    return clc.Decline(
        version=version, out_of_sync=False, peer_id=PEER_ID, diagnosis=code
    )


class Peer:
    """A server of one connection; what it does with it is a function.

    Args:
        family: AF_INET or AF_INET6.
        act: Takes the accepted socket; the rest is read, until the end.
    """

    def __init__(self, family: int, act: Callable[[socket.socket], None]) -> None:
        self.host = "127.0.0.1" if family == socket.AF_INET else "::1"
        self.proposal: clc.Proposal | None = None
        self.rest = b""
        self.error: BaseException | None = None
        self._act = act
        self._listener = socket.socket(family)
        self._listener.settimeout(PATIENCE)
        self._listener.bind((self.host, 0))
        self._listener.listen(1)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """As the command line takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def _serve(self) -> None:
        try:
            with self._listener, self._listener.accept()[0] as sock:
                sock.settimeout(PATIENCE)
                self._act(sock)
                while data := sock.recv(4096):
                    self.rest += data
        except BaseException as error:  # noqa: BLE001  # told by `done`
            self.error = error

    def done(self) -> Peer:
        """Wait for its end; what went wrong is raised here."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self

    def propose(self, sock: socket.socket) -> clc.Proposal:
        """Read the Proposal."""
        head = read(sock, 8)
        message = clc.parse(head + read(sock, clc.parse_header(head).length - 8))
        assert isinstance(message, clc.Proposal)
        self.proposal = message
        return message

    def close(self) -> None:
        self._listener.close()
        self._thread.join(PATIENCE)


def read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, data
        data += more
    return data
