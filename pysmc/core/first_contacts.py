"""First contacts in turn: which ones go on, and who waits for them.

Connections of one moment should share a link group, so the second one waits until the
first has made it. `FirstContacts` decides how long: a first contact that stalls holds
up connections of the same peer ID for `FIRST_CONTACT_TURN` seconds, then the next one
begins another group. A peer ID is only a claim, so its connections are taken together
with who the peer is on the TCP side; and there, `FIRST_CONTACTS_PER_PEER` at a time
begin, whatever IDs they claim, because each takes a queue pair and memory. Nobody else
waits: there is no order among different peers. It sends nothing and knows no timers.

Reference: RFC 7609 section 3.5.2; kernel counterpart: smc_listen_work(), where one lock
for all peers is held until the Confirm is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pysmc.core.handshake import HandshakeState

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping

    from pysmc.core.handshake import Handshake

__all__ = ["FIRST_CONTACTS_PER_PEER", "FIRST_CONTACT_TURN", "ContactKey"]

FIRST_CONTACTS_PER_PEER: Final = 4
"""First contacts in progress with one peer, as it is known on the TCP side."""
FIRST_CONTACT_TURN: Final = 0.5
"""Seconds after which the next connection of the same peer ID waits no longer for a
first contact: many times what one takes, and far from what a client waits."""


class ContactKey(NamedTuple):
    """What the connections of a link group have in common."""

    peer_key: Hashable
    """Who the peer is on the TCP side."""
    peer_id: bytes
    """Who it says that it is, 8 bytes."""
    device: str
    eid: str


class FirstContacts:
    """The first contacts of a server's side."""

    def __init__(self) -> None:
        self._going: dict[Hashable, dict[Handshake, tuple[ContactKey, float]]] = {}
        # In the order in which they came.
        self._waiting: dict[Hashable, dict[Handshake, ContactKey]] = {}

    def begins_at(self, key: ContactKey, now: float) -> float | None:
        """Tell when a first contact may begin as things are.

        Returns:
            `now`, or a later time; None when another one has to end before.
        """
        going = self._going.get(key.peer_key, {})
        if len(going) >= FIRST_CONTACTS_PER_PEER:
            return None
        begun = [when for other, when in going.values() if other == key]
        return max(now, max(begun) + FIRST_CONTACT_TURN) if begun else now

    def begin(self, handshake: Handshake, key: ContactKey, now: float) -> None:
        """Count one that goes on from now."""
        self._going.setdefault(key.peer_key, {})[handshake] = key, now

    def wait(self, handshake: Handshake, key: ContactKey) -> None:
        """Let one wait for its turn."""
        self._waiting.setdefault(key.peer_key, {})[handshake] = key

    def leave(self, handshake: Handshake, key: ContactKey) -> bool:
        """Forget one that is over or no longer waits.

        Returns:
            True when it was going on, so that others may have their turn.
        """
        for table in (self._going, self._waiting):
            of_peer = table.get(key.peer_key)
            if of_peer is not None and handshake in of_peer:
                del of_peer[handshake]
                if not of_peer:
                    del table[key.peer_key]
                return table is self._going
        return False

    def take_partners(self, key: ContactKey) -> list[Handshake]:
        """Take those who waited for just this group, in order."""
        waiting = self._waiting.get(key.peer_key, {})
        partners = [each for each, other in waiting.items() if other == key]
        for each in partners:
            self.leave(each, key)
        return partners

    def take_next(self, peer_key: Hashable, now: float) -> Handshake | None:
        """Take the first of a peer's whose turn has come, None for nobody."""
        for handshake, key in self._waiting.get(peer_key, {}).items():
            if self.begins_at(key, now) == now:
                self.leave(handshake, key)
                return handshake
        return None

    def check(self) -> None:
        """Check that nobody waits for, or behind, a handshake that is over.

        Raises:
            AssertionError: Somebody does; a fault of ours.
        """
        if not (self._going or self._waiting):
            return
        for handshake in _all(self._going):
            assert not handshake.is_over, f"{handshake} is over, and holds up others"
        for handshake in _all(self._waiting):
            assert handshake.state is HandshakeState.QUEUED, f"{handshake} waits"
        assert set(self._waiting) <= set(self._going), "a queue behind nobody"


def _all(table: Mapping[Hashable, Iterable[Handshake]]) -> Iterator[Handshake]:
    for of_peer in table.values():
        yield from of_peer
