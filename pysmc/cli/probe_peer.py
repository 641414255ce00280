"""Ask one peer whether it speaks SMC, step by step, and leave it in order.

Decides what may be sent: a peer that did not show the option gets no byte, unless the
configuration lists it as one that is known to speak SMC; whatever it answers to the
Proposal, the probe declines and closes, so that no memory is shared and no link made.

Source: RFC 7609 sections 3.1, 3.5.1 and A.2; the waits are those of Linux (smc_clc.h).
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pysmc.cli.probe_offer import Offer, make_offer
from pysmc.core.clc_stream import ClcStream
from pysmc.discovery.address import endpoint
from pysmc.discovery.option import sockets
from pysmc.discovery.option.sockets import OptionState
from pysmc.discovery.static import StaticPeers
from pysmc.errors import RemoteProtocolError
from smcproto import clc
from smcproto.constants import EYECATCHER_SMCD, EYECATCHER_SMCR, OsType
from smcproto.diagnosis import PeerDiagnosis, describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.config import Config

__all__ = ["Finding", "probe"]

GOODBYE_SECONDS: Final = 0.5
"""How long a peer may take to close after us; then the connection is closed anyway."""
GOODBYE_BYTES: Final = 1 << 20
"""Most that is read of what a peer says to somebody who has finished."""
SHOWN_BYTES: Final = 32
EYECATCHERS: Final = (EYECATCHER_SMCR, EYECATCHER_SMCD)

Address = tuple[Any, ...]


@dataclass(slots=True)
class Finding:
    """What came back from a peer; what was not reached is None or empty."""

    host: str
    """As it was asked for."""
    port: int
    address: str = ""
    """The numeric address that was connected to."""
    local_address: str = ""
    """Ours, with the port."""
    connect_ms: float | None = None
    """From SYN to SYN-ACK, and what a call takes."""
    tcp_option: bool | None = None
    """Whether the SYN-ACK carried the option; None when that cannot be known."""
    is_listed: bool = False
    """Whether the configuration lists the peer as one that speaks SMC."""
    offer: Offer | None = None
    """What was proposed."""
    answer: clc.ClcMessage | None = None
    """The CLC message that came back, whichever it is."""
    answer_ms: float | None = None
    """From the Proposal to the whole answer."""
    reason: str = ""
    """Why it is no Accept: a word; empty for an Accept."""
    detail: str = ""
    """What was seen, in sentences."""
    advice: str = ""
    """What to look at or to change; may be empty."""
    ms: float = 0.0
    """All of it, without looking up the name and without the goodbye."""

    @property
    def clc(self) -> str:
        """``"accept"``, ``"decline"``, or ``"none"`` for anything else."""
        if isinstance(self.answer, clc.Accept | clc.SmcdAccept):
            return "accept"
        return "decline" if isinstance(self.answer, clc.Decline) else "none"

    @property
    def speaks_smc(self) -> bool:
        """Whether the peer answered as one that speaks SMC."""
        return self.clc != "none"

    @property
    def version(self) -> str | None:
        """Version that an Accept chose: "1", "2.0", "2.1"; None on reused links too."""
        match self.answer:
            case clc.Accept(version=1) | clc.SmcdAccept(version=1):
                return "1"
            case clc.Accept(v2=found) | clc.SmcdAccept(v2=found) if found is not None:
                first = found.first_contact
                return None if first is None else f"2.{first.release}"
        return None

    @property
    def first_contact(self) -> bool | None:
        """Whether an Accept begins a new link group; it always should."""
        match self.answer:
            case clc.Accept() | clc.SmcdAccept():
                return self.answer.first_contact
        return None

    @property
    def eid(self) -> str | None:
        """The EID that an Accept of version 2 chose."""
        match self.answer:
            case clc.Accept(v2=found) | clc.SmcdAccept(v2=found) if found is not None:
                return found.eid
        return None

    def end(self, reason: str, detail: str, advice: str = "") -> None:
        """Say why the question ends here."""
        self.reason, self.detail, self.advice = reason, detail, advice


def probe(
    host: str,
    port: int,
    config: Config,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> Finding:
    """Ask one peer.

    Args:
        host: A name or an address.
        port: 1 to 65535.
        config: What to offer, and which peers are listed.
        seconds: Longest wait for a connection (to each address of a name), and then for
            the answer.
        clock: Seconds.

    Returns:
        What came back; nothing of the peer's doing is raised.
    """
    found = Finding(host, port)
    try:
        # A stream is asked for, or each address would come several times.
        rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # a label of no or too many characters
        why = getattr(error, "strerror", None) or str(error)
        found.end("NO_ADDRESS", f"{host} has no address: {why}.")
        return found
    began = clock()
    sock = _connect(found, [(row[0], row[4]) for row in rows], seconds, clock)
    if sock is not None:
        with sock:
            _ask(found, sock, config, seconds, clock)
            found.ms = (clock() - began) * 1000
            _say_goodbye(sock, clock)
    else:
        found.ms = (clock() - began) * 1000
    return found


# Connecting


def _connect(
    found: Finding,
    rows: list[tuple[int, Address]],
    seconds: float,
    clock: Callable[[], float],
) -> socket.socket | None:
    """Connect to the first address that takes it, with the option where we can."""
    problems: list[tuple[str, OSError]] = []
    for family, address in rows:
        try:
            sock, marked = _dial(found, family, address, seconds, clock)
        except TimeoutError as error:
            problems.append((address[0], error))
            # Perhaps something on the way drops SYNs with an option it does not know.
            unmarked = _dial_unmarked(found, family, address, seconds, clock)
            if unmarked is not None:
                return unmarked
        except OSError as error:
            problems.append((address[0], error))
        else:
            _judge_option(found, sock, marked=marked)
            return sock
    words = "; ".join(f"{name}: {_words(error)}" for name, error in problems)
    found.end(_name_of(problems[-1][1]), f"No connection: {words}.")
    return None


def _dial(
    found: Finding,
    family: int,
    address: Address,
    seconds: float,
    clock: Callable[[], float],
    *,
    wanted: bool = True,
) -> tuple[socket.socket, bool]:
    """Connect to one address.

    Returns:
        The socket, and whether its SYN carried the option.

    Raises:
        OSError: The address does not take it, or not in time.
    """
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(seconds)
        marked = wanted and sockets.opt_in(sock)
        began = clock()
        sock.connect(address)
        found.connect_ms = (clock() - began) * 1000
        found.address = _peer_of(sock, address)[0]
        found.local_address = _text_of(sock.getsockname())
    except BaseException:
        sock.close()
        raise
    return sock, marked


def _peer_of(sock: socket.socket, address: Address) -> Address:
    try:
        return tuple(sock.getpeername())
    except OSError:  # the peer has taken the connection, and reset it already
        return address


def _dial_unmarked(
    found: Finding,
    family: int,
    address: Address,
    seconds: float,
    clock: Callable[[], float],
) -> socket.socket | None:
    """Try the same without the option, if it was that which got no answer."""
    try:
        if not sockets.is_installed():
            return None
        sock, _ = _dial(found, family, address, seconds, clock, wanted=False)
    except OSError:
        return None
    found.end(
        "OPTION_DROPPED",
        "A SYN with the SMC option was not answered, one without it was.",
        "Look for a packet filter on the way that drops unknown TCP options"
        " (kind 254).",
    )
    return sock


def _judge_option(found: Finding, sock: socket.socket, *, marked: bool) -> None:
    """Say what is known of the option; without a reason the peer showed it."""
    state = sockets.read_state(sock) if marked else None
    if state is None:
        found.end(
            "SETUP_MISSING",
            "The SMC option is not attached for this process's cgroup: whether the"
            " peer would have answered it cannot be known.",
            "Run 'pysmc option attach' as root; or list the peer, if it is known to"
            " speak SMC: PYSMC_DISCOVERY=static PYSMC_PEERS=HOST:PORT.",
        )
    elif OptionState.DONE not in state:
        found.end(
            "SETUP_MISSING",
            "The SMC option is attached, but says nothing about this connection.",
            "Run 'pysmc option attach' again: a part of the set-up is missing.",
        )
    elif OptionState.PEER in state:
        found.tcp_option = True
    else:
        found.tcp_option = False
        found.end(
            "PEER_NO_SMC",
            "The SYN-ACK did not carry the SMC option: no byte of SMC was sent.",
            "Let the peer listen on pysmc or AF_SMC; look for SYN cookies, and for a"
            " proxy or packet filter on the way that strips TCP options.",
        )


def _name_of(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "REFUSED"
    if isinstance(error, ConnectionResetError):
        return "CLOSED"
    return "TIMEOUT" if isinstance(error, TimeoutError) else "UNREACHABLE"


def _words(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (error.strerror or str(error)).lower()


def _text_of(address: Address) -> str:
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# Asking


def _ask(
    found: Finding,
    sock: socket.socket,
    config: Config,
    seconds: float,
    clock: Callable[[], float],
) -> None:
    """Propose, and read what comes back, if the peer may be sent that."""
    found.is_listed = _is_listed(found, config)
    if not found.tcp_option and not found.is_listed:
        return
    found.end("", "")
    began = clock()
    try:
        found.offer = make_offer(config, sock)
        sock.sendall(found.offer.proposal.build())
        found.answer = _read_answer(found, sock, began + seconds, clock)
        found.answer_ms = (clock() - began) * 1000
        if found.answer is not None:
            _judge_answer(found, found.answer)
    except TimeoutError:
        found.end(
            "NO_ANSWER",
            f"The peer did not answer the Proposal within {seconds:g} s.",
            "The process behind that port may hang; a kernel's listener answers by"
            " itself.",
        )
    except OSError as error:
        _closed(found, f"ended the connection: {_words(error)}")
    if isinstance(found.answer, clc.Accept | clc.SmcdAccept):
        assert found.offer is not None
        # Whoever has gone since has nothing that a Decline could put in order.
        with contextlib.suppress(OSError):
            sock.sendall(_decline(found.offer, found.answer).build())


def _is_listed(found: Finding, config: Config) -> bool:
    peer = endpoint((found.address, found.port))
    assert peer is not None, "a connected TCP socket has a peer"
    return "static" in config.discovery and (peer, peer.port) in StaticPeers(
        config.peers
    )


def _read_answer(
    found: Finding, sock: socket.socket, ends_at: float, clock: Callable[[], float]
) -> clc.ClcMessage | None:
    """Read exactly one CLC message; None when something else came, which is said.

    Raises:
        OSError: The connection broke, or the time is over.
    """
    stream, seen = ClcStream(), b""
    while True:
        sock.settimeout(max(ends_at - clock(), 1e-3))
        data = sock.recv(stream.wanted)
        if not data:
            broke = f" within a message, after {len(seen)} bytes" if seen else ""
            _closed(found, f"closed the connection{broke}")
            return None
        seen += data
        if not any(eye.startswith(seen[:4]) for eye in EYECATCHERS):
            _not_clc(found, seen, "that begins with no eye catcher")
            return None
        try:
            message = stream.feed(data)
        except RemoteProtocolError as error:
            _not_clc(found, seen, str(error))
            return None
        if message is not None:
            return message


def _closed(found: Finding, what: str) -> None:
    found.end(
        "CLOSED",
        f"The peer {what}, without an answer.",
        "It may be no speaker of SMC at all: look at PYSMC_PEERS, and at proxies on the"
        " way.",
    )


def _not_clc(found: Finding, seen: bytes, why: str) -> None:
    """Say what an answer looks like that is no CLC, and what follows from that."""
    shown = seen[:SHOWN_BYTES]
    kind = ""
    if seen[:1] in {b"\x14", b"\x15", b"\x16", b"\x17"} and seen[1:2] == b"\x03":
        kind = "It looks like TLS. "
    elif seen.startswith(b"HTTP/"):
        kind = "It looks like HTTP. "
    todo = (
        "Take the peer out of PYSMC_PEERS: it does not speak SMC."
        if found.is_listed
        else "The SYN-ACK said otherwise: look for a proxy on the way that copies TCP"
        " options."
    )
    found.end(
        "NO_CLC",
        f"The peer answered with something else than CLC: {shown!r} ({shown.hex()}):"
        f" {why}.",
        kind + todo,
    )


def _judge_answer(found: Finding, answer: clc.ClcMessage) -> None:
    match answer:
        case clc.Accept():
            kind = "a new link group" if answer.first_contact else "a link it knows"
            found.detail = f"The peer accepts, with {kind}."
        case clc.SmcdAccept():
            found.detail = "The peer accepts, but SMC-D, which was not offered."
        case clc.Decline():
            words = describe(answer.diagnosis)
            text = f"The peer declines ({answer.diagnosis:08x}): {words.meaning}"
            found.end(words.name, text, _advice_on(found, answer.diagnosis))
        case _:
            name = type(answer).__name__
            found.end("NO_CLC", f"The peer sent a {name}, as if it were the client.")


def _advice_on(found: Finding, code: int) -> str:
    """Give the advice of a Decline, and what our own offer may have to do with it."""
    advice = describe(code).advice
    offer = found.offer
    is_about_devices = code >> 16 == PeerDiagnosis.NO_DEVICE >> 16
    if offer is not None and offer.note and is_about_devices:
        return f"{advice} What was offered from here: {offer.note}"
    return advice


def _decline(offer: Offer, accept: clc.Accept | clc.SmcdAccept) -> clc.Decline:
    """Make the Decline that takes the Confirm's place: no device was opened here.

    A version 2 Decline has 44 bytes; a kernel drops the connection over any other size.
    """
    code = PeerDiagnosis.NO_DEVICE
    if isinstance(accept, clc.SmcdAccept):
        code = PeerDiagnosis.MODE
    return clc.Decline(
        version=accept.version,
        out_of_sync=False,
        peer_id=offer.proposal.peer_id,
        diagnosis=code,
        os_type=OsType.LINUX if accept.version > 1 else 0,
    )


def _say_goodbye(sock: socket.socket, clock: Callable[[], float]) -> None:
    """Finish writing and wait for the peer to do the same, so that nothing is reset."""
    ends_at = clock() + GOODBYE_SECONDS
    left = GOODBYE_BYTES
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        while left > 0 and (seconds := ends_at - clock()) > 0:
            sock.settimeout(seconds)
            data = sock.recv(min(left, 1 << 16))
            if not data:
                return
            left -= len(data)
