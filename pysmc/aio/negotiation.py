"""One TCP socket's way to a verdict: SMC-R, plain TCP on the same socket, or an error.

Decides what happens to the socket: how many bytes may be taken from it, and who closes
it. What the bytes mean is the core's business, whether CLC may be spoken at all is
discovery's. Only public calls of the loop are used, so that it runs on every loop.

* Exactly the bytes of CLC are read, never one more: what follows stays in the kernel
  for the stock transport.
* A server whose client showed the TCP option looks at the first bytes before it takes
  any: if its own option was lost on the way back, they are the application's.
* A reader stays on TCP until the hand-over, because a Decline may still come.
* A verdict is given once. Whoever was cancelled before it took the verdict leaves
  nothing behind: the connection is ended and the socket closed.

Reference: RFC 7609 section 3.5.1; kernel counterparts: smc_clc.c, af_smc.c.
"""

from __future__ import annotations

import socket
import types
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.aio.devices import ALL
from pysmc.core.events import News
from pysmc.discovery.findings import NO_CLC
from pysmc.discovery.order import Way
from pysmc.discovery.owner import owner_of_peer
from pysmc.discovery.rendezvous import Refusal
from pysmc.errors import ConnectionAborted, ConnectionReset, SmcError
from pysmc.reasons import Reason
from smcproto.constants import EYECATCHER_SMCD, EYECATCHER_SMCR

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine, Generator, Hashable

    from pysmc.aio.driver import Driver
    from pysmc.core.connection import Connection
    from pysmc.core.handshake import Handshake
    from pysmc.core.link import Link
    from pysmc.discovery import Mark, OptionMark
    from pysmc.info import ConnectionInfo

__all__ = [
    "Negotiation",
    "Outcome",
    "as_connection_error",
    "begin",
    "begun",
    "negotiate_client",
    "negotiate_server",
    "unread_bytes",
]

EYECATCHERS = (EYECATCHER_SMCR, EYECATCHER_SMCD)
EYECATCHER_BYTES = 4
TCP_ESTABLISHED = 1
"""First byte of struct tcp_info; any other state once the peer's FIN is there."""
UNREAD_PIECE_BYTES = 64 * 1024
"""Most bytes of one piece of what had arrived."""


class Outcome(NamedTuple):
    """How a negotiation ended when it did not fail."""

    info: ConnectionInfo
    """What the application is told."""
    negotiation: Negotiation | None = None
    """Holds the connection on SMC-R; None when the socket goes on as plain TCP."""


@types.coroutine
def begun() -> Generator[None, None, None]:
    """Await this where `begin` is to stop."""
    yield


def begin(coroutine: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None]:
    """Let a coroutine own what it was given before it has a task.

    A task that is cancelled before its first step never enters its coroutine, so that
    nobody would close an accepted socket.

    Args:
        coroutine: Awaits `begun` first of all, inside of what cleans up.

    Returns:
        The same, for a task or an await.
    """
    coroutine.send(None)
    return coroutine


async def negotiate_client(
    driver: Driver, sock: socket.socket, found: Mark | OptionMark | Reason
) -> Outcome:
    """Take a connected socket to its verdict at the client.

    Args:
        driver: Of the running loop.
        sock: Connected, non-blocking. Closed when this raises.
        found: What discovery said before the connect.

    Returns:
        The outcome; on plain TCP the socket is untouched but for CLC bytes.

    Raises:
        Declined: SMC-R is required and not possible.
        HandshakeTimeout: The peer speaks SMC, but did not answer in time.
        ConnectionError: The connection was lost.
    """
    try:
        if isinstance(found, Reason):
            return driver.on_tcp("client", found)
        if found.way is not Way.STATIC and _may_begin(found):
            # There was room before the connect, but others have connected as well. A
            # peer that is listed already waits for CLC, so it is not asked again.
            why = driver.why_not()
            if why is not None:
                driver.discovery.settle_tcp(found, Refusal.LIMIT, why)
                return driver.on_tcp("client", why, found.way)
        with driver.negotiating():
            is_listed = found.way is Way.STATIC
            verdict = await driver.discovery.wait_confirmed(found)
            if not verdict.smc:
                return driver.on_tcp("client", verdict.reason)
            refusal = driver.refusal() if is_listed else None
            return await Negotiation(driver, sock, "client", way=found.way).run(refusal)
    except BaseException:
        sock.close()
        raise


def _may_begin(found: Mark | OptionMark) -> bool:
    """Tell whether a handshake may follow; not once it is known to be TCP."""
    return found.verdict is None or found.verdict.smc


async def negotiate_server(driver: Driver, conn: socket.socket, way: Way) -> Outcome:
    """Take an accepted socket, which discovery found worth asking, to its verdict.

    Args:
        driver: Of the running loop.
        conn: Accepted, non-blocking. Closed when this raises.
        way: By which way its client may have shown that it speaks SMC.

    Returns:
        As `negotiate_client`.

    Raises:
        The same errors as `negotiate_client`.
    """
    try:
        if way.is_binding:
            return await _answer(driver, conn, way)
        instead = None if driver.has_room() else driver.limit_reason()
        if instead is not None and not driver.admission.may_refuse():
            return driver.on_tcp("server", instead)
        # Not by `negotiating`: whoever stalls costs as little as can be.
        driver.admission.begin()
        try:
            verdict = await driver.discovery.confirm(conn, instead=instead)
            if not verdict.smc:
                return driver.on_tcp("server", verdict.reason)
            negotiation = Negotiation(driver, conn, "server", verdict.process, way)
            del verdict
            return await negotiation.run()
        finally:
            driver.admission.end()
    except BaseException:
        conn.close()
        raise


async def _answer(driver: Driver, conn: socket.socket, way: Way) -> Outcome:
    """Shake hands with a client that speaks CLC in any case, or decline."""
    host = conn.getpeername()[0]
    is_option = way is Way.OPTION
    owner = owner_of_peer(conn) if is_option else None
    peer = None if owner is None else (host, owner)
    negotiation = Negotiation(driver, conn, "server", peer, way)
    with driver.negotiating(host):
        refusal = driver.refusal(host, must_answer=is_option)
        if refusal is None or not is_option:
            return await negotiation.run(refusal)
    # It takes nobody's place: until its Proposal is there it costs what TCP would.
    return await negotiation.run(refusal)


class Negotiation:
    """The handle of a handshake, and of its connection until a transport takes over.

    Args:
        driver: Of the running loop.
        sock: The TCP socket; it stays the caller's.
        role: "client" or "server".
        peer: Who a client on this host is: the number of its process, or its address
            with its user. Else it is known by its address alone.
        way: How the peer showed that it speaks SMC.
    """

    __slots__ = (
        "_driver",
        "_handshake",
        "_outbox",
        "_peer",
        "_reading",
        "_result",
        "_sock",
        "_unsure",
        "_verdict",
        "_way",
        "_writing",
        "connection",
        "error",
        "peer_done",
        "role",
        "salvaged",
    )

    def __init__(
        self,
        driver: Driver,
        sock: socket.socket,
        role: str,
        peer: Hashable = None,
        way: Way | None = None,
    ) -> None:
        self._driver = driver
        self._peer = peer
        self._way = way
        # Whether the first bytes may be the application's, and how many are awaited.
        self._unsure = 1 if way is Way.OPTION and role == "server" else 0
        self._sock = sock
        self.role = role
        self.connection: Connection | None = None
        self.error: SmcError | None = None
        """What ended the connection before a transport took it."""
        self.peer_done = False
        """Whether the peer had finished writing by then."""
        # None, because an empty deque is larger than all the rest of a negotiation.
        self.salvaged: deque[memoryview] | None = None
        """What had arrived by then."""
        self._handshake: Handshake | None = None
        self._outbox = b""
        self._reading = False
        self._writing = False
        self._verdict: asyncio.Future[None] = driver.loop.create_future()
        self._result: Reason | SmcError | None = None

    async def run(self, refusal: Reason | None = None) -> Outcome:
        """Shake hands, or only decline with a reason that is known already.

        When it is cancelled everything of it is given back; the caller closes the
        socket.

        Raises:
            Declined: SMC-R is required and not possible.
            HandshakeTimeout: The peer did not answer in time.
            ConnectionError: The connection was lost.
        """
        driver = self._driver
        self._begin(refusal)
        driver.negotiations[self] = None
        try:
            driver.settle()
            if self.role == "server":
                self._take_tcp()  # the Proposal is mostly there already
            self.watch()
            driver.pump_pending()
            await self._verdict
        except BaseException:
            self._give_back()
            raise
        finally:
            self._stop()
            driver.negotiations.pop(self, None)
        if self.connection is not None:
            if self.error is not None and not (self.salvaged or self.peer_done):
                self.drop()
                raise as_connection_error(self.error)
            return Outcome(driver.info_of(self.connection, self.role, self._way), self)
        if isinstance(self._result, Reason):
            return driver.on_tcp(self.role, self._result, self._way)
        assert self._result is not None
        raise as_connection_error(self._result)

    def _begin(self, refusal: Reason | None) -> None:
        driver, key = self._driver, self._peer
        if key is None:
            try:
                key = self._sock.getpeername()[0]
            except OSError as error:
                gone = "the TCP connection ended before the SMC handshake"
                raise ConnectionReset(gone) from error
        fitting = ALL if refusal else driver.fitting(self._sock)
        endpoint = driver.endpoint
        begin = endpoint.connect if self.role == "client" else endpoint.accept
        self._handshake = begin(
            key,
            driver.time(),
            refusal or fitting.refusal,
            fitting.offers,
            fitting.absent,
        )
        self._handshake.handle = self

    def _give_back(self) -> None:
        """Whoever waited is gone: forget the handshake, or end its result."""
        if self.connection is not None:
            self.drop()
        elif not self._verdict.done() or self._verdict.cancelled():
            assert self._handshake is not None
            self._driver.endpoint.abandon(self._handshake, self._driver.time())
            self._driver.settle()

    def take(self) -> Connection:
        """Give the connection to a transport, once."""
        connection, self.connection = self.connection, None
        assert connection is not None, "the connection was taken before"
        return connection

    def drop(self) -> None:
        """End the connection that nobody took."""
        connection, self.connection = self.connection, None
        if connection is not None:
            self._driver.end(connection, abort=True)

    # What the core orders

    def send(self, data: bytes) -> None:
        """Send bytes of CLC; they are kept when the kernel does not take them now."""
        if self._outbox:
            self._outbox += data
        else:
            self._outbox = data
            self._send_more()
        # An answer follows every message but a Decline.
        self.watch()

    def _send_more(self) -> None:
        try:
            sent = self._sock.send(self._outbox)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._outbox = b""
            self._watch_writing(wanted=False)
            self._lose(error)
            return
        self._outbox = self._outbox[sent:]
        self._watch_writing(wanted=bool(self._outbox))
        if not self._outbox and self._has_verdict():
            self._wake()

    def check_tcp(self) -> None:
        """Look at TCP a last time: the hand-over point."""
        handshake, driver = self._handshake, self._driver
        assert handshake is not None
        data = self._read()
        if data:
            driver.endpoint.receive_tcp(handshake, data, driver.time())
        else:
            # The end of TCP is quiet as well: no Decline comes after it. A peer that
            # connects, writes and closes may be that quick.
            driver.endpoint.tcp_quiet(handshake, driver.time())

    # What the core says

    def established(self, connection: Connection) -> None:
        """The connection runs over SMC-R from now on."""
        connection.handle = self
        self.connection = connection
        # News that came before this was told to nobody.
        self.peer_done = connection.peer_done
        if not self._outbox:
            self._wake()  # else once the Confirm is on its way

    def fell_back(self, why: Reason) -> None:
        """Both ends go on with TCP, once a Decline of ours is on its way."""
        self._result = why
        if not self._outbox:
            self._wake()

    def failed(self, error: SmcError) -> None:
        """The TCP stream cannot be trusted any more."""
        self._outbox = b""
        self._result = error
        self._wake()

    def receive_news(self, news: int) -> None:
        """Leave news for the transport, which finds the rest in the connection."""
        if news & News.DONE:
            self.peer_done = True

    def salvage(self) -> None:
        """Copy out what arrived, once: the memory is about to go."""
        if self.connection is not None and self.salvaged is None and self.error is None:
            self.salvaged = unread_bytes(self.connection)

    def lose(self, error: SmcError) -> None:
        """The connection was lost before a transport took it."""
        self.error = error
        self._wake()

    def _has_verdict(self) -> bool:
        return self._result is not None or self.connection is not None

    def _wake(self) -> None:
        self._stop()
        if not self._verdict.done():
            self._verdict.set_result(None)

    # The socket

    def watch(self) -> None:
        """Have a reader on the socket exactly while the core wants bytes of it."""
        handshake = self._handshake
        wanted = (
            handshake is not None
            and handshake.wanted > 0
            and not self._verdict.done()
            and self._result is None
        )
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self._driver.loop.add_reader(self._sock.fileno(), self._on_readable)
            else:
                self._driver.loop.remove_reader(self._sock.fileno())

    def _watch_writing(self, *, wanted: bool) -> None:
        if wanted != self._writing:
            self._writing = wanted
            if wanted:
                self._driver.loop.add_writer(self._sock.fileno(), self._send_more)
            else:
                self._driver.loop.remove_writer(self._sock.fileno())

    def read_tcp(self) -> None:
        """Take what TCP has for the core, before something else is processed."""
        handshake, driver = self._handshake, self._driver
        assert handshake is not None
        while handshake.wanted:
            data = self._read()
            if not data:
                return
            driver.endpoint.receive_tcp(handshake, data, driver.time())
            driver.settle()

    def is_due(self, now: float) -> bool:
        """Whether the handshake's deadline has come."""
        return self._handshake is not None and self._handshake.due_at <= now

    def is_on(self, link: Link) -> bool:
        """Whether the handshake uses a link."""
        return self._handshake is not None and self._handshake.link is link

    def _on_readable(self) -> None:
        self._take_tcp()
        self.watch()
        self._driver.pump_pending()

    def _take_tcp(self) -> None:
        handshake, driver = self._handshake, self._driver
        assert handshake is not None
        data = self._read()
        if data:
            driver.endpoint.receive_tcp(handshake, data, driver.time())
            # What follows the header of a message has come with it, as a rule.
            if not handshake.stream.is_empty and (data := self._read()):
                driver.endpoint.receive_tcp(handshake, data, driver.time())
        elif data is not None:
            # A peer that is quick may have confirmed the link, written and closed: what
            # it sent over the fabric came before the end of TCP.
            driver.pump_all()
            if not handshake.is_over:
                driver.endpoint.tcp_lost(handshake, driver.time(), None)
        driver.settle()

    def _read(self) -> bytes | None:
        """Read what the core wants; empty at the end, None when nothing is there."""
        assert self._handshake is not None
        wanted = self._handshake.wanted
        if not wanted:
            return None
        try:
            if self._unsure and not self._is_clc():
                return None
            return self._sock.recv(wanted)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            self._lose(error)
            return None

    def _is_clc(self) -> bool:
        """Look at the first bytes, and leave them; False when no more is to be read.

        If they are not CLC's, or none will come, the client has not seen our option:
        both ends are TCP.
        """
        begin = self._sock.recv(EYECATCHER_BYTES, socket.MSG_PEEK)
        is_clc = any(eyecatcher.startswith(begin) for eyecatcher in EYECATCHERS)
        if is_clc and len(begin) == EYECATCHER_BYTES:
            self._await_bytes(0)
            return True
        if is_clc and begin and not self._has_tcp_ended():
            # Readable next when the rest is there, or when there will be no rest.
            self._await_bytes(EYECATCHER_BYTES)
            return False
        assert self._handshake is not None
        driver = self._driver
        driver.endpoint.abandon(self._handshake, driver.time())
        self._await_bytes(0)
        self.fell_back(NO_CLC)
        return False

    def _has_tcp_ended(self) -> bool:
        """Tell whether the peer has sent its last byte, without reading any."""
        state: bytes = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
        return state[0] != TCP_ESTABLISHED

    def _await_bytes(self, count: int) -> None:
        """Be called when so many bytes can be read; 0 when it is sure what they are."""
        if count != self._unsure and EYECATCHER_BYTES in {count, self._unsure}:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count or 1)
        self._unsure = count

    def _lose(self, error: OSError) -> None:
        driver = self._driver
        assert self._handshake is not None
        if not self._has_verdict():
            driver.endpoint.tcp_lost(self._handshake, driver.time(), error)
            driver.settle()
            return
        # The verdict is there, but the peer will never have all of it.
        lost = ConnectionReset(f"TCP ended before the handshake was sent: {error}")
        lost.__cause__ = error
        if self.connection is not None:
            self.lose(lost)
        else:
            self._result = lost
            self._wake()

    def _stop(self) -> None:
        if self._reading:
            self._reading = False
            self._driver.loop.remove_reader(self._sock.fileno())
        self._watch_writing(wanted=False)


def unread_bytes(connection: Connection) -> deque[memoryview]:
    """Copy out what has arrived and was not read."""
    region = connection.rmb.handle
    pieces: deque[memoryview] = deque()
    while True:
        offset, length = connection.peek(UNREAD_PIECE_BYTES)
        if not length:
            return pieces
        start = region.offset + offset
        pieces.append(memoryview(region.memory[start : start + length]))
        connection.consume(length)


def as_connection_error(error: Exception) -> Exception:
    """Turn an error of the core into what code written for TCP expects."""
    if isinstance(error, ConnectionError | TimeoutError):
        return error
    aborted = ConnectionAborted(str(error))
    aborted.__cause__ = error
    return aborted
