"""A position-coded stream: which byte stands where follows from its place alone.

Byte n of a flow is byte n of a ChaCha20 key stream whose key is the flow's name. So
whoever receives needs no copy of what was sent, and what is wrong can be told apart:
bytes that are missing, that come twice, that belong to another place or another flow,
that were never written, or that are a CLC message.

Decides nothing but that. Needs the package `cryptography`.

Source: RFC 7539 section 2.4 (ChaCha20).
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

__all__ = ["Flow", "Flows", "Receiver"]

_CLC_EYECATCHERS = (b"\xe2\xd4\xc3\xd9", b"\xe2\xd4\xc3\xc4")
_SEARCH_BYTES = 8
"""As many bytes are looked for elsewhere; by chance they are found nowhere."""


class Flow:
    """The bytes of one direction of one connection.

    Args:
        name: Makes its bytes differ from those of every other flow.
    """

    __slots__ = ("_key", "_known", "name", "position")

    def __init__(self, name: str) -> None:
        self.name = name
        self.position = 0
        """Bytes that were taken."""
        self._key = hashlib.blake2s(name.encode()).digest()
        self._known = b""

    def take(self, count: int) -> bytes:
        """Take the next bytes."""
        start = self.position
        self.position += count
        return self.at(start, count)

    def at(self, start: int, count: int) -> bytes:
        """Give the bytes of a place.

        Args:
            start: From 0.
            count: How many.
        """
        known = self._known
        if start + count <= len(known):
            return known[start : start + count]
        if start + count <= 4096:
            # Most flows are short, and making a cipher costs more than its bytes.
            self._known = known = self._make(0, 4096)
            return known[start : start + count]
        return self._make(start, count)

    def _make(self, start: int, count: int) -> bytes:
        block, skip = divmod(start, 64)
        nonce = block.to_bytes(4, "little") + bytes(12)
        algorithm = algorithms.ChaCha20(self._key, nonce)
        encryptor = Cipher(algorithm, mode=None).encryptor()
        return encryptor.update(bytes(skip + count))[skip:]


class Flows:
    """All flows of one run: a byte of one is known in every other.

    Args:
        run: Makes the flows of one run differ from those of all others.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._flows: list[Flow] = []

    def new(self, name: str) -> Flow:
        """Make a flow; its name is one of a kind in this run."""
        flow = Flow(f"{self._run}/{name}")
        self._flows.append(flow)
        return flow

    def forget(self, *flows: Flow) -> None:
        """Look for wrong bytes in these no more."""
        for flow in flows:
            self._flows.remove(flow)

    def locate(self, data: bytes, expected: Flow, position: int) -> str:
        """Say what wrong bytes are.

        Args:
            data: What was received in place of what was expected.
            expected: Whose bytes should have come.
            position: Which ones.
        """
        if data[:4] in _CLC_EYECATCHERS:
            return "a CLC message"
        if not any(data[:_SEARCH_BYTES]):
            return "zeros: memory that nobody wrote"
        key = data[:_SEARCH_BYTES]
        if len(key) == _SEARCH_BYTES:
            for flow in (expected, *self._flows):
                place = flow.at(0, flow.position + _SEARCH_BYTES).find(key)
                if place < 0:
                    continue
                if flow is not expected:
                    return f"byte {place} of the flow {flow.name}"
                how = "again" if place < position else "too early"
                return f"byte {place} of the same flow, {how}"
        return "bytes of no flow"


class Receiver:
    """Follows a flow at its other end.

    Args:
        flow: What the other end takes from.
        flows: Where wrong bytes are looked for.
    """

    __slots__ = ("_flow", "_flows", "position")

    def __init__(self, flow: Flow, flows: Flows) -> None:
        self._flow = flow
        self._flows = flows
        self.position = 0
        """Bytes that came, all of them right."""

    def receive(self, data: bytes) -> str | None:
        """Compare bytes with what has to come.

        Returns:
            None when they are right; else what is wrong, in words.
        """
        start, count = self.position, len(data)
        expected = self._flow.at(start, count)
        if data != expected:
            wrong = next(
                n for n in range(count) if data[n : n + 1] != expected[n : n + 1]
            )
            what = self._flows.locate(data[wrong:], self._flow, start + wrong)
            return f"{self._flow.name}: at byte {start + wrong} came {what}"
        self.position = start + count
        if self.position > self._flow.position:
            return (
                f"{self._flow.name}: {self.position} bytes came, and only"
                f" {self._flow.position} were written"
            )
        return None
