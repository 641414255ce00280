"""What the cases with a real kernel have in common; each is a function in `CASES`.

A case runs in a `Room`: on the host by `test_real_kernel`, in the lab's guest by
`tests/lab/test_option.py`. It ends by an assertion or by returning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pysmc.discovery.option.sockets import OptionState, opt_in, read_state
from tests.discovery.option.room import Sniffer, connected, listener

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from tests.discovery.option.room import Room

WANT, PEER, DONE = OptionState.WANT, OptionState.PEER, OptionState.DONE
NOSYN, SERVER = OptionState.NOSYN, OptionState.SERVER
MAYBE = OptionState.MAYBE
BOTH_CLIENT, BOTH_SERVER = WANT | PEER | DONE, WANT | PEER | DONE | SERVER
PLAIN_CLIENT, PLAIN_SERVER = WANT | DONE, WANT | DONE | SERVER
FAMILIES = {
    "IPv4": ("127.0.0.1", "127.0.0.1"),
    "IPv6": ("::1", "::1"),
    "mapped": ("::", "127.0.0.1"),
}
"""Where a listener is bound, and where a client connects to."""

CASES: dict[str, Callable[[Room], None]] = {}
BARE: dict[str, Callable[[Room], None]] = {}
"""These attach the programs by themselves."""


def case(function: Callable[[Room], None]) -> Callable[[Room], None]:
    CASES[function.__name__] = function
    return function


def bare(function: Callable[[Room], None]) -> Callable[[Room], None]:
    BARE[function.__name__] = function
    return function


def asks(sock: socket.socket) -> None:
    assert opt_in(sock)


def matrix(room: Room, family: str) -> None:
    """Both ends' answers, and the option in SYN and SYN-ACK and nowhere else."""
    bound, to = FAMILIES[family]
    sniffer = Sniffer()
    for server_asks in (False, True):
        for client_asks in (False, True):
            pair = connected(
                listener(bound, asks if server_asks else None),
                to,
                asks if client_asks else None,
            )
            found = read_state(pair.client), read_state(pair.server)
            pair.exchange()
            peer = PEER if server_asks and client_asks else OptionState(0)
            assert found == (
                WANT | DONE | peer if client_asks else OptionState(0),
                WANT | DONE | SERVER | peer if server_asks else OptionState(0),
            )
            segments = sniffer.both_ends()
            assert len(segments) > 6
            for one in segments:
                assert one.has_option == (
                    (one.is_syn and client_asks)
                    or (one.is_syn_ack and client_asks and server_asks)
                ), one
                assert sum(option[0] == 254 for option in one.options) <= 1
