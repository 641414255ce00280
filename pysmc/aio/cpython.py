"""Every private name of CPython's asyncio that this room relies on, in one table.

What is not listed here is public. A test looks each name up on every Python that it
finds, so that a new version cannot take one away unnoticed. Differences between the
versions are evened out here too, and nowhere else.

Source: asyncio/selector_events.py, base_events.py, sslproto.py and transports.py of
CPython 3.11 to 3.13.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import sys
import threading
from asyncio import base_events, constants, sslproto, transports, trsock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import collections
    import socket
    import ssl
    from collections.abc import Callable

__all__ = [
    "ACCEPTED_BEYOND",
    "PRIVATE_NAMES",
    "FlowControlMixin",
    "attach",
    "callback_owner",
    "check_sendfile",
    "close_waiter",
    "detach",
    "disown_transports",
    "forget_pending",
    "guard_protocol",
    "has_timer",
    "is_of_asyncio",
    "is_served",
    "next_timer",
    "own_descriptor",
    "ready_handles",
    "replace_transport",
    "sendfile_by_fallback",
    "start_tls_of_asyncio",
    "tell_of_every_end",
    "tls_protocol",
    "transport_socket",
    "turn_runner",
    "unwatch",
    "watch",
]

PRIVATE_NAMES: dict[str, tuple[str, ...]] = {
    # Overridden: where a transport is made, and where a listener starts and stops.
    "asyncio.SelectorEventLoop._create_connection_transport": (
        "self", "sock", "protocol_factory", "ssl", "server_hostname",
    ),
    "asyncio.SelectorEventLoop._accept_connection": (
        "self", "protocol_factory", "sock", "sslcontext", "server", "backlog",
    ),
    "asyncio.SelectorEventLoop._accept_connection2": (
        "self", "protocol_factory", "conn", "extra", "sslcontext", "server",
    ),
    "asyncio.SelectorEventLoop._make_socket_transport": (
        "self", "sock", "protocol", "waiter", "extra", "server",
    ),
    "asyncio.SelectorEventLoop._make_ssl_transport": (
        "self", "rawsock", "protocol", "sslcontext", "waiter", "extra", "server",
    ),
    "asyncio.SelectorEventLoop._start_serving": ("self", "protocol_factory", "sock"),
    "asyncio.SelectorEventLoop._stop_serving": ("self", "sock"),
    # Called: a server counts its transports.
    "asyncio.base_events.Server._attach": ("self",),
    "asyncio.base_events.Server._detach": ("self",),
    # Called: programs may not watch the descriptor of a transport, we do.
    "asyncio.SelectorEventLoop._ensure_fd_no_transport": ("self", "fd"),
    "asyncio.SelectorEventLoop._add_reader": ("self", "fd", "callback"),
    "asyncio.SelectorEventLoop._remove_reader": ("self", "fd"),
    # Derived from: loop.sendfile demands it of a transport.
    "asyncio.transports._FlowControlMixin._maybe_pause_protocol": ("self",),
    "asyncio.transports._FlowControlMixin._maybe_resume_protocol": ("self",),
    "asyncio.transports._FlowControlMixin._set_write_buffer_limits": (
        "self", "high", "low",
    ),
    "asyncio.constants._SendfileMode.FALLBACK": (),
    # Called: says what cannot be sent, in asyncio's words.
    "asyncio.BaseEventLoop._check_sendfile_params": (
        "self", "sock", "file", "offset", "count",
    ),
    # Used: keeps the protocol out of the way while a file is sent.
    "asyncio.base_events._SendfileFallbackProtocol": ("transp",),
    # TLS over any transport.
    "asyncio.sslproto.SSLProtocol": (
        "self", "loop", "app_protocol", "sslcontext", "waiter", "server_side",
        "server_hostname", "ssl_handshake_timeout", "ssl_shutdown_timeout",
    ),
    "asyncio.sslproto.SSLProtocol._get_app_transport": ("self",),
    # Before an end in the middle of a handshake, which asyncio tells nobody of.
    "asyncio.sslproto.SSLProtocol._set_state": ("self", "new_state"),
    "asyncio.sslproto.SSLProtocolState.DO_HANDSHAKE": (),
    "asyncio.sslproto.SSLProtocolState.UNWRAPPED": (),
    # Waited for: ends with a stream's connection.
    "asyncio.StreamReaderProtocol._get_close_waiter": ("self", "stream"),
    # Public, but called with loops that do not derive from it.
    "asyncio.BaseEventLoop.start_tls": (
        "self", "transport", "protocol", "sslcontext", "server_side",
        "server_hostname", "ssl_handshake_timeout", "ssl_shutdown_timeout",
    ),
    "asyncio.trsock.TransportSocket": ("self", "sock"),
    # A simulated loop: has no pipe to itself, and another order of what is ready.
    "asyncio.SelectorEventLoop._make_self_pipe": ("self",),
    "asyncio.SelectorEventLoop._close_self_pipe": ("self",),
    "asyncio.SelectorEventLoop._write_to_self": ("self",),
    "asyncio.SelectorEventLoop._process_events": ("self", "event_list"),
    "asyncio.SelectorEventLoop._run_once": ("self",),
    "asyncio.SelectorEventLoop._asyncgen_firstiter_hook": ("self", "agen"),
    "asyncio.SelectorEventLoop._asyncgen_finalizer_hook": ("self", "agen"),
    "asyncio._set_running_loop": (),
    "asyncio.Handle._callback": (),
    "asyncio.TimerHandle._when": (),
    "asyncio.Task._log_destroy_pending": (),
}  # fmt: skip
"""Dotted name to the parameters that we rely on (more may exist)."""

if TYPE_CHECKING:

    class FlowControlMixin(asyncio.Transport):
        """Write limits with pause_writing and resume_writing."""

        _extra: dict[str, Any]
        _loop: asyncio.AbstractEventLoop

        def __init__(
            self, extra: dict[str, Any] | None, loop: asyncio.AbstractEventLoop
        ) -> None: ...
        def _maybe_pause_protocol(self) -> None: ...
        def _maybe_resume_protocol(self) -> None: ...

else:
    FlowControlMixin = transports._FlowControlMixin  # noqa: SLF001

# From 3.13 a server keeps its transports, before it only counted them.
_SERVER_KEEPS_TRANSPORTS = (
    len(inspect.signature(base_events.Server._attach).parameters) > 1  # type: ignore[attr-defined]  # noqa: SLF001
)


def accepted_beyond(
    accept: Callable[..., None] = asyncio.SelectorEventLoop._accept_connection,  # type: ignore[attr-defined]  # noqa: SLF001
) -> int:
    """Tell how many connections a turn of the loop accepts beyond the backlog.

    Newer versions take one more, so that a backlog of 0 serves somebody.

    Args:
        accept: What accepts, another one in tests.
    """
    looks = 0

    class Listener:
        def accept(self) -> Any:
            nonlocal looks
            looks += 1
            raise BlockingIOError

    with contextlib.suppress(Exception):  # of a version that nobody has seen yet
        accept(None, None, Listener(), backlog=0)
    return looks


ACCEPTED_BEYOND = accepted_beyond()


def attach(server: Any, transport: asyncio.Transport) -> None:
    """Tell a server that a transport of it lives."""
    if _SERVER_KEEPS_TRANSPORTS:
        server._attach(transport)  # noqa: SLF001
    else:
        server._attach()  # noqa: SLF001


def detach(server: Any, transport: asyncio.Transport) -> None:
    """Tell a server that a transport of it has ended."""
    if _SERVER_KEEPS_TRANSPORTS:
        server._detach(transport)  # noqa: SLF001
    else:
        server._detach()  # noqa: SLF001


def own_descriptor(
    loop: asyncio.AbstractEventLoop, fd: int, transport: asyncio.Transport
) -> None:
    """Refuse a descriptor to programs, while its transport is not closing."""
    known = getattr(loop, "_transports", None)
    if known is not None:  # the loop is asyncio's
        known[fd] = transport


def watch(
    loop: asyncio.AbstractEventLoop, fd: int, callback: Callable[[], None]
) -> None:
    """Watch a descriptor that may belong to a transport."""
    getattr(loop, "_add_reader", loop.add_reader)(fd, callback)


def unwatch(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Watch a descriptor no more."""
    getattr(loop, "_remove_reader", loop.remove_reader)(fd)


def transport_socket(sock: socket.socket) -> Any:
    """Wrap a socket as ``get_extra_info("socket")`` gives it."""
    return trsock.TransportSocket(sock)


def ready_handles(loop: Any) -> collections.deque[asyncio.Handle]:
    """Give what a loop of asyncio's runs in its next turn; to look and to reorder."""
    handles: collections.deque[asyncio.Handle] = loop._ready  # noqa: SLF001
    return handles


def turn_runner(loop: Any) -> Callable[[], None]:
    """Give what runs one turn of a loop of asyncio's that does not run otherwise.

    It does what run_forever does around each turn. The hooks of async generators stay
    set: whoever drives several loops puts back those that were there before.
    """
    enter = functools.partial(asyncio._set_running_loop, loop)  # noqa: SLF001
    leave = functools.partial(asyncio._set_running_loop, None)  # noqa: SLF001
    run_once, thread = loop._run_once, threading.get_ident()  # noqa: SLF001
    hooks = loop._asyncgen_firstiter_hook, loop._asyncgen_finalizer_hook  # noqa: SLF001

    def run_turn() -> None:
        loop._thread_id = thread  # noqa: SLF001
        sys.set_asyncgen_hooks(*hooks)
        enter()
        try:
            run_once()
        finally:
            loop._thread_id = None  # noqa: SLF001
            leave()

    return run_turn


def next_timer(loop: Any) -> float | None:
    """Tell when the next timer of a loop of asyncio's rings, None when none is set."""
    timers: list[asyncio.TimerHandle] = loop._scheduled  # noqa: SLF001
    if not timers:
        return None
    if not timers[0].cancelled():
        return timers[0].when()
    living = (timer.when() for timer in timers if not timer.cancelled())
    return min(living, default=None)


def has_timer(loop: Any, now: float) -> bool:
    """Tell whether a timer of a loop of asyncio's is due, even one that was cancelled.

    That one goes away in the next turn.
    """
    timers = loop._scheduled  # noqa: SLF001
    return bool(timers) and timers[0]._when <= now  # noqa: SLF001


def callback_owner(handle: asyncio.Handle) -> Any:
    """Give the object whose method a handle calls: of a task's step, the task."""
    callback = handle._callback  # type: ignore[attr-defined]  # noqa: SLF001
    return getattr(callback, "__self__", None)


def disown_transports(loop: Any) -> None:
    """Let all transports of a loop be collected without a word, and without closing.

    For a loop whose process has ended, as far as anybody else can tell.
    """
    for transport in list(loop._transports.values()):  # noqa: SLF001
        tls = getattr(transport.get_protocol(), "_app_transport", None)
        if tls is not None:
            tls._closed = True  # noqa: SLF001
        transport._closing = True  # noqa: SLF001
        transport._sock = None  # noqa: SLF001


def forget_pending(task: asyncio.Task[Any]) -> None:
    """Let a task that will never go on be collected without a word."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001


_Guard: Any = base_events._SendfileFallbackProtocol  # type: ignore[attr-defined]  # noqa: SLF001


class _FileGuard(_Guard):  # type: ignore[misc]
    """Stands in for a protocol while a file is sent, whatever happens meanwhile.

    asyncio's own loses the end of the connection when the one who sends was cancelled
    just before, tells of room after the end, and takes it for an error when somebody
    resumes reading, as a stream's reader does by itself.
    """

    _is_lost = False
    _write_ready_fut: Any

    def connection_lost(self, exc: BaseException | None) -> None:
        self._is_lost = True
        waiter, self._write_ready_fut = self._write_ready_fut, None
        if waiter is not None and not waiter.done():
            waiter.set_exception(exc or ConnectionError("Connection is closed by peer"))
            waiter.exception()  # perhaps nobody waits
        self._proto.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        protocol, rest = self._proto, memoryview(data)
        if not isinstance(protocol, asyncio.BufferedProtocol):
            protocol.data_received(data)
            return
        while rest and not self._is_lost:
            room = memoryview(protocol.get_buffer(len(rest))).cast("B")
            count = min(len(room), len(rest))
            if not count:
                message = "get_buffer() returned an empty buffer"
                raise RuntimeError(message)
            room[:count] = rest[:count]
            protocol.buffer_updated(count)
            rest = rest[count:]

    def eof_received(self) -> bool | None:
        keep_open: bool | None = self._proto.eof_received()
        return keep_open

    def resume_writing(self) -> None:
        waiter, self._write_ready_fut = self._write_ready_fut, None
        if waiter is not None and not waiter.done():
            waiter.set_result(False)

    async def restore(self) -> None:
        if self._is_lost:
            return
        transport, protocol = self._transport, self._proto
        transport.set_protocol(protocol)
        if self._should_resume_reading:
            transport.resume_reading()
        was_paused: bool = self._should_resume_writing
        is_paused: bool = transport._protocol_paused  # noqa: SLF001
        if is_paused and not was_paused:
            protocol.pause_writing()
        elif was_paused and not is_paused:
            protocol.resume_writing()


def guard_protocol(transport: asyncio.Transport) -> Any:
    """Keep the protocol out of the way while a file is sent.

    Gives an object with the coroutines ``drain``, which waits while the transport has
    enough, and ``restore``, which puts the protocol back.
    """
    return _FileGuard(transport)


def check_sendfile(
    loop: Any, transport: asyncio.BaseTransport, file: Any, offset: Any, count: Any
) -> None:
    """Refuse what asyncio does not send over TCP, with its own errors.

    Raises:
        TypeError: offset or count is no int.
        ValueError: One of them is out of range, or the file is not open for bytes.
    """
    sock = transport.get_extra_info("socket")
    loop._check_sendfile_params(sock, file, offset, count)  # noqa: SLF001


def sendfile_by_fallback() -> Any:
    """Give the mark by which loop.sendfile reads and writes blocks itself."""
    return constants._SendfileMode.FALLBACK  # noqa: SLF001


def is_of_asyncio(transport: Any) -> bool:
    """Tell whether a transport is of asyncio's kind: ours, or asyncio's TLS over it."""
    return isinstance(transport, transports._FlowControlMixin)  # noqa: SLF001


def close_waiter(writer: asyncio.StreamWriter, protocol: Any) -> asyncio.Future[None]:
    """Give what ends with a stream's connection; one for everybody who waits."""
    waiter: asyncio.Future[None] = protocol._get_close_waiter(writer)  # noqa: SLF001
    return waiter


def is_served(protocol: Any) -> bool:
    """Tell whether a stream's protocol was made with a callback, as servers do."""
    return getattr(protocol, "_client_connected_cb", None) is not None


def replace_transport(
    writer: asyncio.StreamWriter, protocol: Any, transport: asyncio.Transport
) -> None:
    """Let a stream go on over TLS.

    The protocol has a method for it, which has another name from 3.13.
    """
    writer._transport = transport  # type: ignore[attr-defined]  # noqa: SLF001
    protocol._transport = transport  # noqa: SLF001
    protocol._over_ssl = True  # noqa: SLF001


def start_tls_of_asyncio(loop: asyncio.AbstractEventLoop) -> Any:
    """Give asyncio's start_tls for a loop that has another one of its own.

    It asks of the loop only what every loop has.
    """
    return functools.partial(asyncio.BaseEventLoop.start_tls, loop)  # type: ignore[arg-type]


class _TellingProtocol(sslproto.SSLProtocol):
    """Tells its application also of an end in the middle of the handshake."""

    _state: Any
    _set_state: Any

    def connection_lost(self, exc: BaseException | None) -> None:
        states = sslproto.SSLProtocolState
        if self._state is states.DO_HANDSHAKE:
            self._set_state(states.UNWRAPPED)
        super().connection_lost(exc)


def tell_of_every_end(tls: object) -> None:
    """Let a TLS protocol that upgrades a connection end for its application.

    asyncio forgets a protocol that was connected before TLS when its connection is
    lost during the handshake: connection_lost never comes, and wait_closed waits for
    ever. When the peer says that it ends all is well, and over TCP the kernel says so
    even for a peer that was killed.
    """
    if type(tls) is sslproto.SSLProtocol:
        tls.__class__ = _TellingProtocol


def tls_protocol(
    loop: asyncio.AbstractEventLoop,
    protocol: asyncio.BaseProtocol,
    sslcontext: ssl.SSLContext | None,
    waiter: asyncio.Future[Any] | None,
    **options: Any,
) -> tuple[asyncio.BaseProtocol, asyncio.Transport]:
    """Make the protocol that speaks TLS, and the transport of its application.

    Raises:
        ValueError: An argument is not allowed.
        ssl.SSLError: Likewise.
    """
    make: Any = sslproto.SSLProtocol
    tls = make(loop, protocol, sslcontext, waiter, **options)
    return tls, tls._get_app_transport()  # noqa: SLF001
