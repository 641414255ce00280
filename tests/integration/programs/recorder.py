# ruff: noqa: T201  # a program answers on standard output
"""A TCP proxy that records every byte in both directions, knowing nothing of them.

The argument is the port to which it leads. Prints its own port; then, for each line on
standard input, one JSON object with the connections that have ended: what went up, what
came down (hex), and whether the mark of the client was on its SYN.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import threading

HOST = "127.0.0.1"
TCP_SAVE_SYN, TCP_SAVED_SYN = 27, 28


class Recorder:
    """All connections of one proxy."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._ended: list[dict[str, object]] = []
        self.listener = socket.create_server((HOST, 0))
        self.listener.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)

    def serve(self) -> None:
        """Accept for ever."""
        while True:
            client, _ = self.listener.accept()
            threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        syn = client.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, 256)
        with client, socket.create_connection((HOST, self._target)) as server:
            up, down = bytearray(), bytearray()
            ways = {client: (server, up), server: (client, down)}
            while ways:
                for source in select.select(list(ways), [], [])[0]:
                    sink, record = ways[source]
                    data = source.recv(1 << 16)
                    record += data
                    if data:
                        sink.sendall(data)
                    else:
                        sink.shutdown(socket.SHUT_WR)
                        del ways[source]
        with self._lock:
            self._ended.append({"up": up.hex(), "down": down.hex(), "tos": syn[1]})

    def take(self) -> list[dict[str, object]]:
        """Give and forget what has ended."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended


def main() -> None:
    """Record until standard input ends."""
    recorder = Recorder(int(sys.argv[1]))
    print(recorder.listener.getsockname()[1], flush=True)
    threading.Thread(target=recorder.serve, daemon=True).start()
    for _ in sys.stdin:
        print(json.dumps(recorder.take()), flush=True)


if __name__ == "__main__":
    main()
