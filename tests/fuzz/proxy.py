"""A TCP proxy that changes CLC messages, for two loops on shared memory.

TCP passes through it; what the peers write into each other's memory does not. It runs
in threads of its own with blocking sockets, so that no loop of ours has a part in it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from tests.fuzz.in_path import EOF, KINDS, NAMES, Change, Place

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Proxy"]

HOST = "127.0.0.1"
EYECATCHERS = (bytes.fromhex("e2d4c3d9"), bytes.fromhex("e2d4c3c4"))
PATIENCE = 20.0


class Proxy:
    """Stands before one server; one connection at a time.

    Args:
        port: Of the server.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listener = socket.create_server((HOST, 0))
        self._listener.settimeout(0.2)
        self.port: int = self._listener.getsockname()[1]
        self.changes: Sequence[Change] = ()
        """What happens to the messages of the next connections."""
        self.said: dict[Place, bytes] = {}
        """The CLC messages of the last connection, as they were sent."""
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._accepter = self._start(self._accept)

    def close(self) -> None:
        """End all threads."""
        self._over.set()
        self._accepter.join(PATIENCE)
        self._listener.close()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def _start(self, what: object, *args: object) -> threading.Thread:
        thread = threading.Thread(target=what, args=args, daemon=True)  # type: ignore[arg-type]
        thread.start()
        return thread

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            server = socket.create_connection((HOST, self._server), PATIENCE)
            self.said = {}
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            both = [(client, server, "client"), (server, client, "server")]
            # Two directions share a pair of sockets: the last one closes both.
            left = [2]
            lock = threading.Lock()
            for source, target, name in both:
                thread = self._start(
                    self._pump, source, target, name, (client, server), left, lock
                )
                self._threads.append(thread)

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        name: str,
        both: tuple[socket.socket, socket.socket],
        left: list[int],
        lock: threading.Lock,
    ) -> None:
        try:
            self._pass_on(source, target, name)
        except OSError:
            # A reset of one end is one for the other.
            for sock in both:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        with lock:
            left[0] -= 1
            if left[0]:
                return
        for sock in both:
            sock.close()

    def _pass_on(self, source: socket.socket, target: socket.socket, name: str) -> None:
        source.settimeout(PATIENCE)
        buffer, in_handshake, number = b"", True, 0
        while data := source.recv(1 << 16):
            buffer += data
            while in_handshake and len(buffer) >= 8:
                if buffer[:4] not in EYECATCHERS:
                    in_handshake = False
                    break
                length = int.from_bytes(buffer[5:7], "big")
                if len(buffer) < length:
                    break
                message, buffer = buffer[:length], buffer[length:]
                self._say(target, Place(name, "tcp", number), message)
                number += 1
            if not in_handshake:
                target.sendall(buffer)
                buffer = b""
        target.sendall(buffer)
        target.shutdown(socket.SHUT_WR)

    def _say(self, target: socket.socket, place: Place, message: bytes) -> None:
        self.said[place] = message
        pieces = [(0.0, message)]
        for change in self.changes:
            if change.place == place:
                pieces = [
                    each
                    for seconds, piece in pieces
                    for each in (
                        KINDS[change.kind](piece, change.first, change.second)
                        if piece and piece is not EOF
                        else [(seconds, piece)]
                    )
                ]
        for seconds, piece in pieces:
            if seconds:
                self._over.wait(min(seconds, 2.0))
            if piece is EOF:
                raise ConnectionResetError
            target.sendall(piece)


assert NAMES == ("client", "server")
