"""CLC spoken by hand over a marked TCP socket: a peer that does what no good one does.

To whoever is at the other end it has shown in SYN or SYN-ACK that it speaks SMC. What
it then says is the scenario's choice. It has no queue pair: whatever the fabric is to
carry goes nowhere, like that of a peer that died.
"""

from __future__ import annotations

import select
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Self

from smcproto import clc, clc_v2
from smcproto.constants import OsType, PathType

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["OddListener", "OddPeer", "call", "decline"]

PEER_ID = bytes.fromhex("0dd1020304050607")
MAC = bytes.fromhex("020304050607")
NOBODYS_PAIR = 0xABCDE
"""A queue pair that nobody has."""
HEADER_BYTES = 8
PATIENCE = 20.0


def gid_of(host: str) -> bytes:
    """Give the RoCEv2 GID of an address."""
    return ip_address(f"::ffff:{host}").packed


def decline(
    code: int = 0x03030000, *, version: int = 2, out_of_sync: bool = False
) -> clc.Decline:
    """Make a Decline."""
    return clc.Decline(
        version=version, out_of_sync=out_of_sync, peer_id=PEER_ID, diagnosis=code
    )


@dataclass
class OddPeer:
    """One end of a connection; the other one awaits CLC."""

    sock: socket.socket

    @property
    def port(self) -> int:
        """Our own port."""
        port: int = self.sock.getsockname()[1]
        return port

    def say(self, *words: clc.ClcMessage | bytes) -> None:
        """Send messages, or bytes, in one segment."""
        self.sock.sendall(
            b"".join(
                word if isinstance(word, bytes) else word.build() for word in words
            )
        )

    def hear(self) -> clc.ClcMessage:
        """Read just one message."""
        header = self._exactly(HEADER_BYTES)
        length = clc.parse_header(header).length
        return clc.parse(header + self._exactly(length - HEADER_BYTES))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            assert more, f"TCP ended after {data.hex()}"
            data += more
        return data

    def rest(self) -> bytes | OSError:
        """Read until the end of TCP; gives the bytes, or how it broke."""
        data = b""
        try:
            while more := self.sock.recv(1 << 16):
                data += more
        except OSError as error:
            return error
        return data

    def is_quiet(self, seconds: float) -> bool:
        """Tell whether nothing comes for some time."""
        return not select.select([self.sock], [], [], seconds)[0]

    def propose(self, eid: str = "PYSMC.LAB") -> None:
        """Propose as our client would, of this end's address."""
        host = self.sock.getsockname()[0]
        self.say(
            clc.Proposal(
                version=2,
                peer_id=PEER_ID,
                gid=bytes(16),
                mac=MAC,
                typev1=PathType.NONE,
                typev2=PathType.SMCR,
                ip_area=None,
                v2=clc_v2.ProposalExtension(
                    eids=(eid,),
                    release=1,
                    gid=gid_of(host),
                    max_connections=255,
                    max_links=1,
                ),
            )
        )

    def accept(self, *, first_contact: bool = True) -> None:
        """Read a Proposal and accept it, with a queue pair that nobody has."""
        proposal = self.hear()
        assert isinstance(proposal, clc.Proposal)
        assert proposal.v2 is not None
        first = _first_contact() if first_contact else None
        self.say(
            clc.Accept(
                first_contact=first_contact,
                v2=clc_v2.AcceptExtension(proposal.v2.eids[0], first),
                **self._contact(),
            )
        )

    def confirm(self) -> None:
        """Read an Accept and confirm it, with a queue pair that nobody has."""
        accept = self.hear()
        assert isinstance(accept, clc.Accept)
        assert accept.v2 is not None
        first = accept.v2.first_contact
        gids = () if first is None else (gid_of(self.sock.getsockname()[0]),)
        self.say(
            clc.Confirm(
                first_contact=accept.first_contact,
                v2=clc_v2.ConfirmExtension(accept.v2.eid, first, gids),
                **self._contact(),
            )
        )

    def _contact(self) -> dict[str, Any]:
        return {
            "version": 2,
            "peer_id": PEER_ID,
            "gid": gid_of(self.sock.getsockname()[0]),
            "mac": MAC,
            "qp_number": NOBODYS_PAIR,
            "rkey": 0x0DD,
            "rmbe_index": 1,
            "alert_token": 0x0DD,
            "rmbe_size_code": 2,
            "mtu_code": 3,
            "virtual_address": 1 << 20,
            "psn": 1,
        }

    def close(self) -> None:
        """Close it."""
        self.sock.close()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def _first_contact() -> clc_v2.FirstContactExtension:
    return clc_v2.FirstContactExtension(
        direct=True,
        os_type=OsType.LINUX,
        release=1,
        host_name="odd",
        max_connections=255,
        max_links=1,
    )


def call(host: str, server: tuple[str, int]) -> OddPeer:
    """Connect from an address, marked; the server has to be marked too."""
    sock = _marked(host)
    sock.connect(server)
    _assert_peer(sock)
    return OddPeer(sock)


class OddListener:
    """Listens, marked.

    Args:
        host: At which address.
    """

    def __init__(self, host: str) -> None:
        self._sock = _marked(host)
        self._sock.listen()
        self.port: int = self._sock.getsockname()[1]

    def accept(self) -> OddPeer:
        """Take a connection; its client has to be marked too."""
        accepted, _ = self._sock.accept()
        accepted.settimeout(PATIENCE)
        _assert_peer(accepted)
        return OddPeer(accepted)

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self._sock.close()


def _marked(host: str) -> socket.socket:
    from pysmc.discovery.option import sockets

    sock = socket.socket()
    sock.settimeout(PATIENCE)
    sock.bind((host, 0))
    assert sockets.opt_in(sock), "the TCP option is not installed here"
    return sock


def _assert_peer(sock: socket.socket) -> None:
    from pysmc.discovery.option import sockets

    state = sockets.read_state(sock)
    assert state is not None
    assert sockets.OptionState.PEER in state, state
