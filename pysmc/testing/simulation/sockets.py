"""A simulated TCP socket: what the kernel says to a program, without a kernel.

Decides what every call on a socket answers in every state, as Linux does: partial
sends, half close, the end of file, a reset that is told once, what unread bytes make of
a close. What travels between two sockets, and when, is `pysmc.testing.simulation.tcp`.

Sockets never block. Their descriptors are numbers of one process, the lowest free one
first, far above those of this host: whoever hands one to the real kernel is refused.

Source: tcp(7), socket(7), RFC 9293 section 3.10; kernel counterparts: tcp.c
(tcp_recvmsg_locked, tcp_sendmsg_locked, __tcp_close), tcp_input.c (tcp_reset).
"""

from __future__ import annotations

import errno
import heapq
import os
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn

from pysmc.discovery.saved_syn import TCP_SAVED_SYN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pysmc.testing.simulation.tcp import Pipe, TcpNetwork

__all__ = ["Address", "Descriptors", "KernelSocket", "SimSocket"]

Address = tuple[str, int]

FIRST_DESCRIPTOR = 1_000_000
"""Above every limit of open files that a host has."""

NEW, LISTENING, CONNECTING = "new", "listening", "connecting"
CONNECTED, ENDED, CLOSED = "connected", "ended", "closed"

_SYN_HEADER = struct.Struct("!BB38x")
"""IPv4 and TCP headers of a SYN, as far as anybody looks at them."""
_WRITABLE_PART = 3
"""A socket is writable again when a third of its buffer is free."""
_IP_TOS = (socket.IPPROTO_IP, socket.IP_TOS)
_IP_TCLASS = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
_LINGER = (socket.SOL_SOCKET, socket.SO_LINGER)
_ERROR = (socket.SOL_SOCKET, socket.SO_ERROR)


def _fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


class Descriptors:
    """The descriptors of one simulated process.

    Args:
        touch: Is told a number whose readiness may have changed.
    """

    def __init__(self, touch: Callable[[int], None]) -> None:
        self.owners: dict[int, object] = {}
        """What is open, by number."""
        self.touch = touch
        self.limit: int | None = None
        """Most that may be open at once, as RLIMIT_NOFILE; None for no limit."""
        self._free: list[int] = []

    def take(self, owner: object) -> int:
        """Open the lowest free number.

        Raises:
            OSError: EMFILE, the limit is reached.
        """
        if self.limit is not None and len(self.owners) >= self.limit:
            _fail(errno.EMFILE)
        fd = FIRST_DESCRIPTOR + len(self.owners)
        if self._free:
            fd = heapq.heappop(self._free)
        self.owners[fd] = owner
        return fd

    def give(self, fd: int) -> None:
        """Close a number."""
        del self.owners[fd]
        heapq.heappush(self._free, fd)


class SimSocket:
    """What a program holds of a socket; the kernel closes what nobody holds.

    It has the methods of `KernelSocket`.

    Args:
        kernel: The socket itself.
    """

    __slots__ = ("__weakref__", "kernel")

    family = socket.AF_INET
    type = socket.SOCK_STREAM
    proto = socket.IPPROTO_TCP

    def __init__(self, kernel: KernelSocket) -> None:
        self.kernel = kernel

    def __repr__(self) -> str:
        return repr(self.kernel)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __del__(self) -> None:
        self.kernel.close()

    def fileno(self) -> int:
        """Tell the descriptor, -1 when closed."""
        return self.kernel.fileno()

    def recv(self, count: int, flags: int = 0) -> bytes:
        """Receive; see `KernelSocket.recv`."""
        return self.kernel.recv(count, flags)

    def send(self, data: Any, flags: int = 0) -> int:
        """Send; see `KernelSocket.send`."""
        return self.kernel.send(data, flags)

    def accept(self) -> tuple[SimSocket, Address]:
        """Take the next connection; see `KernelSocket.accept`."""
        made, address = self.kernel.accept()
        return SimSocket(made), address


class KernelSocket:
    """A TCP socket of a simulated process, as far as asyncio and pysmc use one.

    Args:
        network: Carries what it sends.
        descriptors: Of its process; None until it is accepted.
        address: What it is bound to.
    """

    def __init__(
        self, network: TcpNetwork, descriptors: Descriptors | None, address: Address
    ) -> None:
        self.network = network
        self.descriptors = descriptors
        self.name = address
        self.peer_name: Address | None = None
        self.state = NEW
        self.out: Pipe | None = None
        """Where it sends to."""
        self.queue: deque[KernelSocket] = deque()
        """Of a listener: what may be accepted."""
        self.backlog = 0
        self.half_open = 0
        """Of a listener: connections that are not accepted yet, ready or not."""
        self.listener: KernelSocket | None = None
        self.is_announced = False
        """Of a listener: its SYN-ACKs carry the mark."""
        self.syn = b""
        """Of an accepted socket: what the listener kept of the SYN."""
        self.inbox = bytearray()
        self.error = 0
        """What SO_ERROR would say."""
        self.got_fin = self.sent_fin = self.is_fin_known = False
        self.is_read_shut = False
        self.was_up = False
        self.options: dict[tuple[int, int], Any] = {}
        self._fd = -1 if descriptors is None else descriptors.take(self)

    def __repr__(self) -> str:
        return f"<SimSocket {self.label} {self.state}>"

    @property
    def label(self) -> str:
        """Address and port, for people."""
        return f"{self.name[0]}:{self.name[1]}"

    # What a selector asks

    def is_readable(self) -> bool:
        """Whether a read, or an accept, would not have to wait."""
        return bool(
            self.inbox
            or self.got_fin
            or self.error
            or self.queue
            or self.is_read_shut
            or self.state is ENDED
        )

    def is_writable(self) -> bool:
        """Whether a send would not have to wait, or would fail."""
        if self.state is not CONNECTED:
            return self.state is ENDED or bool(self.error)
        if self.sent_fin or self.error:
            return True
        assert self.out is not None
        room = self.network.sndbuf_bytes - self.out.size
        return room * _WRITABLE_PART >= self.network.sndbuf_bytes

    def touch(self) -> None:
        """Say that readiness may have changed."""
        if self._fd >= 0 and self.descriptors is not None:
            self.descriptors.touch(self._fd)

    # What every program may ask

    def fileno(self) -> int:
        """Tell the descriptor, -1 when closed."""
        return self._fd

    def setblocking(self, flag: bool) -> None:  # noqa: FBT001  # socket's signature
        """Accept False: in a world nothing blocks.

        Raises:
            ValueError: It was to block.
        """
        if flag:
            message = "a simulated socket never blocks"
            raise ValueError(message)

    def gettimeout(self) -> float:
        """Tell that it does not block."""
        return 0.0

    def getsockname(self) -> Address:
        """Tell the own address."""
        self._check_open()
        return self.name

    def getpeername(self) -> Address:
        """Tell the peer's address.

        Raises:
            OSError: ENOTCONN, also after a reset.
        """
        self._check_open()
        if self.peer_name is None or self.state is not CONNECTED:
            _fail(errno.ENOTCONN)
        return self.peer_name

    def setsockopt(self, level: int, option: int, value: Any, *_: Any) -> None:
        """Set an option; the world acts on those of the mark, and on SO_LINGER."""
        self._check_open()
        self.options[level, option] = value

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> Any:
        """Read an option, 0 when it was never set; SO_ERROR is told once."""
        self._check_open()
        key = (level, option)
        if key == _ERROR:
            number, self.error = self.error, 0
            return number
        if key == (socket.IPPROTO_TCP, TCP_SAVED_SYN):
            syn, self.syn = self.syn, b""
            return syn[:buflen]
        value = self.options.get(key, b"" if buflen else 0)
        return bytes(value)[:buflen] if buflen else value

    def detach(self) -> int:
        """Give the descriptor up; the simulated kernel closes it then."""
        fd = self._fd
        self.close()
        return fd

    # A listener

    def listen(self, backlog: int = 128) -> None:
        """Let others connect."""
        self._check_open()
        self.backlog = max(1, backlog)
        if self.state is NEW:
            self.network.listen(self)
            self.state = LISTENING

    def accept(self) -> tuple[KernelSocket, Address]:
        """Take the next connection.

        Raises:
            BlockingIOError: There is none.
            OSError: EINVAL, it does not listen; EMFILE, no descriptor is left.
        """
        self._check_open()
        if self.state is not LISTENING:
            _fail(errno.EINVAL)
        if not self.queue:
            _fail(errno.EAGAIN)
        assert self.descriptors is not None
        made = self.queue[0]
        made._fd = self.descriptors.take(made)  # noqa: SLF001  # its own class
        made.descriptors = self.descriptors
        self.queue.popleft()
        self.half_open -= 1
        made.listener = None
        assert made.peer_name is not None
        return made, made.peer_name

    # A connection

    def connect(self, address: Address) -> None:
        """Begin to connect.

        Raises:
            BlockingIOError: It has begun, as always.
            OSError: EISCONN or EALREADY.
        """
        self._check_open()
        if self.state is CONNECTING:
            _fail(errno.EALREADY)
        if self.was_up:
            _fail(errno.EISCONN)
        self.error = 0
        self.peer_name = (address[0], address[1])
        self.state = CONNECTING
        tos = self.options.get(_IP_TOS, 0) or self.options.get(_IP_TCLASS, 0)
        self.network.connect(self, _SYN_HEADER.pack(0x45, tos))
        _fail(errno.EINPROGRESS)

    def send(self, data: Any, flags: int = 0) -> int:
        """Send what there is room for.

        Raises:
            BlockingIOError: There is no room now.
            OSError: What ended the connection, once; then EPIPE.
        """
        del flags  # MSG_NOSIGNAL, of which there is nothing to simulate
        self._check_open()
        self._raise_error()
        if self.state is CONNECTING:
            _fail(errno.EAGAIN)
        if self.state is not CONNECTED or self.sent_fin:
            _fail(errno.EPIPE)
        assert self.out is not None
        view = memoryview(data).cast("B")
        room = self.out.room()
        if room <= 0:
            _fail(errno.EAGAIN)
        taken = bytes(view[:room])
        if taken:
            self.out.put("data", taken)
        return len(taken)

    def sendmsg(self, buffers: Iterable[Any]) -> int:
        """Send several buffers, as far as there is room."""
        return self.send(b"".join(buffers))

    def recv(self, count: int, flags: int = 0) -> bytes:
        """Receive: empty at the end.

        Raises:
            BlockingIOError: There is nothing now.
            OSError: What ended the connection, once and after all that has come.
        """
        self._check_open()
        inbox = self.inbox
        if not inbox:
            if self.got_fin:
                return b""  # whatever ended the other direction since
            self._raise_error()
            if self.is_read_shut or self.state is ENDED:
                return b""
            connected = self.state in {CONNECTED, CONNECTING}
            _fail(errno.EAGAIN if connected else errno.ENOTCONN)
        data = bytes(inbox[:count])
        if not flags & socket.MSG_PEEK:
            del inbox[: len(data)]
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive into a buffer; see `recv`."""
        view = memoryview(buffer).cast("B")
        data = self.recv(nbytes or len(view), flags)
        view[: len(data)] = data
        return len(data)

    def shutdown(self, how: int) -> None:
        """End one direction, or both.

        Raises:
            OSError: ENOTCONN.
        """
        self._check_open()
        if self.state is not CONNECTED:
            _fail(errno.ENOTCONN)
        if how in {socket.SHUT_WR, socket.SHUT_RDWR}:
            self._finish()
        if how in {socket.SHUT_RD, socket.SHUT_RDWR}:
            self.is_read_shut = True
        self.touch()

    def close(self) -> None:
        """Close as the kernel does: with a FIN, or with a reset where bytes are lost.

        That is so where unread bytes are left, and with SO_LINGER at 0 seconds.
        Idempotent.
        """
        if self._fd < 0:
            return
        assert self.descriptors is not None
        self.descriptors.give(self._fd)
        self._fd = -1
        self.drop()

    def drop(self) -> None:
        """End what nobody has a descriptor of."""
        state, self.state = self.state, CLOSED
        if state is LISTENING:
            self.network.unlisten(self)
            while self.queue:
                self.queue.popleft().abandon()
        elif state is CONNECTED:
            assert self.out is not None
            linger = self.options.get(_LINGER)
            is_hard = linger is not None and _is_zero_linger(linger)
            if self.inbox or is_hard:
                self.out.reset()
            else:
                self._finish()
        self.inbox.clear()

    def abandon(self) -> None:
        """Reset a connection that nobody accepted."""
        if self.state is CONNECTED:
            assert self.out is not None
            self.out.reset()
        self.state = CLOSED

    # What arrives

    def arrive(self, data: bytes | memoryview) -> None:
        """Take bytes of the peer."""
        if self.state is CLOSED:
            # Nobody can read them any more: the peer has to know.
            assert self.out is not None
            self.out.clear()
            self.out.put("RST")
        elif self.state is CONNECTED:
            self.inbox += data
            self.touch()

    def come_up(self) -> None:
        """Be connected from now on."""
        self.state, self.was_up = CONNECTED, True
        self.touch()

    def arrive_fin(self) -> None:
        """Take the peer's end of file."""
        if self.state is CONNECTED:
            self.got_fin = True
            self._look_for_end()
            self.touch()

    def fin_arrived(self) -> None:
        """The peer has our end of file."""
        self.is_fin_known = True
        self._look_for_end()

    def _look_for_end(self) -> None:
        if self.state is CONNECTED and self.is_fin_known and self.got_fin:
            self.state = ENDED
            self.touch()

    def end(self, number: int) -> None:
        """Take a reset, or the end of all retries: what waits to be sent is lost."""
        if self.out is not None:
            self.out.clear()
        if self.state is CONNECTING and self.listener is not None:
            self.listener.half_open -= 1
            self.listener, self.state = None, CLOSED
        elif self.state in {CONNECTED, CONNECTING}:
            refused = self.state is CONNECTING and number == errno.ECONNRESET
            half = self.got_fin and number == errno.ECONNRESET
            self.error = number
            if refused:
                self.error = errno.ECONNREFUSED
            elif half:
                self.error = errno.EPIPE
            self.state = ENDED
            self.touch()

    # Helpers

    def _finish(self) -> None:
        if not self.sent_fin:
            self.sent_fin = True
            assert self.out is not None
            self.out.put("FIN")

    def _check_open(self) -> None:
        if self._fd < 0:
            _fail(errno.EBADF)

    def _raise_error(self) -> None:
        if self.error:
            number, self.error = self.error, 0
            _fail(number)


def _is_zero_linger(value: bytes) -> bool:
    on, seconds = struct.unpack("ii", value)
    return bool(on) and seconds == 0
