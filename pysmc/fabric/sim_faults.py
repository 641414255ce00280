"""What goes wrong on the simulated fabric, one method for each kind of fault.

Decides how a fault looks to whoever is hit by it, as an RDMA device would show it: a
reliable connection loses nothing silently, so whatever never lands takes the link down
when the sender's retries end; a device that is gone takes every link of it with it;
completions may be lost, doubled or nonsense, because that is what drivers' bugs are.
When a fault happens, a test, a plan or a seed decides.

Source: the InfiniBand specification's reliable connected service; RFC 7609 section 4.6
(what a link that fails may have lost).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pysmc.errors import FabricError
from pysmc.fabric.base import Completion, CompletionKind, Status, Update

if TYPE_CHECKING:
    from pysmc.fabric.sim import SimNetwork
    from pysmc.fabric.sim_device import SimDevice, SimQueuePair

__all__ = ["RETRY_SECONDS", "VERBS", "Faults", "Tamper"]

RETRY_SECONDS = 2.0
"""Seconds until a sender gives up on a peer that acknowledges nothing."""

VERBS = ("domain", "queue pair", "region", "connect", "send", "write", "publish")
"""What `Faults.fail_verb` can let fail."""

_ALLOCATING = frozenset({"domain", "queue pair", "region"})


class Tamper:
    """Changes the completions of a device, until it has done so often enough.

    Args:
        kind: Which completions.
        copies: How often each is told: 0 loses it, 2 doubles it.
        count: How many completions are changed.
        later: How many other completions come before the second copy.
    """

    def __init__(
        self, kind: CompletionKind, copies: int, count: int = 1, later: int = 0
    ) -> None:
        self.changed = 0
        """Completions that were lost or doubled so far."""
        self._kind = kind
        self._copies = copies
        self._count = count
        self._later = later
        self._kept: Completion | None = None

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to change."""
        return self._count <= 0 and self._kept is None

    def change(self, completion: Completion) -> list[Completion]:
        """Give what is told in place of a completion."""
        told = [completion]
        if self._kept is not None:
            self._later -= 1
            if self._later <= 0:
                told.append(self._kept)
                self._kept = None
                self.changed += 1
        elif self._count > 0 and completion.kind is self._kind:
            self._count -= 1
            if self._later:
                self._kept = completion
            else:
                told = [completion] * self._copies
                self.changed += 1
        return told


class Faults:
    """The faults of one network.

    Args:
        network: Whose.
    """

    def __init__(self, network: SimNetwork) -> None:
        self._network = network
        self._failing: dict[str, tuple[int, Status]] = {}
        self._failed: Counter[str] = Counter()
        self._tampers: list[tuple[str, Tamper]] = []

    @property
    def hits(self) -> Counter[str]:
        """How often what was to go wrong later did so: it may never come to that.

        A verb by its name; "lose completion", "double completion", "double update" and
        "repeat update" as often as one of them has changed something.
        """
        hits = self._failed.copy()
        hits.update(name for name, tamper in self._tampers if tamper.changed)
        return hits

    # Verbs

    def fail_verb(
        self, verb: str, nth: int = 1, status: Status = Status.NO_MEMORY
    ) -> None:
        """Let a verb fail.

        An allocation raises. A post that fails is a queue pair in error: it goes down,
        and the peer's follows. A connect ends with the status.

        Args:
            verb: One of `VERBS`.
            nth: Which of the next calls, from 1.
            status: How it fails.

        Raises:
            ValueError: There is no such verb.
        """
        if verb not in VERBS:
            text = f"no verb {verb!r}; there are {', '.join(VERBS)}"
            raise ValueError(text)
        self._failing[verb] = (nth, status)

    def call(
        self, verb: str, device: SimDevice, pair: SimQueuePair | None = None
    ) -> bool:
        """Count a verb that is about to be carried out.

        Args:
            verb: One of `VERBS`.
            device: Whose.
            pair: The queue pair of a connect or a post.

        Returns:
            True when it fails; then the queue pair is told.

        Raises:
            FabricError: It is an allocation and fails.
        """
        if device.is_gone and verb in _ALLOCATING:
            operation, text = f"create a {verb}", "the device is gone"
            raise FabricError(operation, Status.UNREACHABLE.name, text)
        if not self._failing or verb not in self._failing:
            return False
        left, status = self._failing[verb]
        if left > 1:
            self._failing[verb] = (left - 1, status)
            return False
        del self._failing[verb]
        self._failed[verb] += 1
        text = "ENOMEM: as the fault plan says"
        if verb in _ALLOCATING:
            self._network.note(f"{device}: {verb}: {status.value}")
            operation = f"create a {verb}"
            raise FabricError(operation, status.name, text)
        assert pair is not None, "a post has a queue pair"
        self._network.note(f"{pair}: {verb} fails: {status.value}")
        if verb == "connect":
            pair.connected_later(status, text)
        else:
            pair.outgoing.items.clear()
            pair.go_down(status, text)
            self._abandon(pair.peer)
        return True

    # Links

    def cut(
        self,
        pair: SimQueuePair,
        status: Status = Status.TIMED_OUT,
        *,
        peer_later: float = 0.0,
    ) -> None:
        """Cut a link: both ends go down, and what is on its way is lost.

        Args:
            pair: One end, which notices now.
            status: What both are told.
            peer_later: Seconds until the other end notices.
        """
        self._network.note(f"{pair}: cut")
        peer = pair.peer
        pair.outgoing.items.clear()
        pair.go_down(status, "the link was cut")
        if peer is None:
            return
        peer.outgoing.items.clear()
        if peer_later:
            self._abandon(peer, peer_later, status)
        else:
            peer.go_down(status, "the link was cut")

    def lose(self, pair: SimQueuePair) -> None:
        """Lose the next thing that a queue pair has on its way, or posts.

        Nothing behind it gets through either, and when the retries end the link goes
        down at both ends.
        """
        if pair.outgoing.items:
            item = pair.outgoing.items.popleft()
            self._network.note(f"{pair}: lost: {item.text}")
        else:
            self._network.note(f"{pair}: loses what it posts")
        pair.loses = True
        self._abandon(pair)
        self._abandon(pair.peer, 2 * RETRY_SECONDS)

    def vanish(self, pair: SimQueuePair, seconds: float = RETRY_SECONDS) -> None:
        """Let the peer's adapter acknowledge what never reaches its memory.

        What is on its way and what is posted from now on completes well and does
        nothing, until the link is cut.

        Args:
            pair: Whose posts vanish.
            seconds: How long the adapter goes on like that.
        """
        self._network.note(f"{pair}: what it posts vanishes")
        pair.vanishes = True
        self._network.later(seconds, f"{pair}: its adapter dies", pair.cut_if_up)

    def pause(self, pair: SimQueuePair, seconds: float) -> None:
        """Deliver nothing that a queue pair posts, for some seconds."""
        self._network.note(f"{pair}: paused for {seconds:g} s")
        pair.outgoing.is_held = True
        self._network.later(seconds, f"{pair}: goes on", pair.release)

    def slow_down(self, pair: SimQueuePair, delay: float, seconds: float) -> None:
        """Let what a queue pair posts arrive later, for some seconds.

        Args:
            pair: Whose posts.
            delay: Seconds that each takes.
            seconds: How long it is like that.
        """
        self._network.note(f"{pair}: {delay:g} s late for {seconds:g} s")
        pair.outgoing.delay = delay
        self._network.later(seconds, f"{pair}: fast again", pair.hurry)

    def _abandon(
        self,
        pair: SimQueuePair | None,
        seconds: float = RETRY_SECONDS,
        status: Status = Status.TIMED_OUT,
    ) -> None:
        """Let an end find out by its own retries that nobody answers."""
        if pair is not None:
            text = "nobody acknowledged what was sent"
            self._network.later(
                seconds,
                f"{pair}: retries are over",
                lambda: pair.give_up(status, text),
            )

    def unanswered(self, pair: SimQueuePair) -> None:
        """A post reached a queue pair that is down: the sender's retries begin."""
        if not pair.is_retrying:
            pair.is_retrying = True
            self._abandon(pair)

    # Completions

    def lose_completion(self, device: SimDevice, count: int = 1) -> None:
        """Swallow the next completions of publishes at a device."""
        self._tamper(
            device, "lose completion", Tamper(CompletionKind.PUBLISH, 0, count)
        )

    def double_completion(self, device: SimDevice, count: int = 1) -> None:
        """Tell the next completions of publishes twice."""
        tamper = Tamper(CompletionKind.PUBLISH, 2, count)
        self._tamper(device, "double completion", tamper)

    def double_update(self, device: SimDevice, later: int = 0) -> None:
        """Tell the next update twice.

        Args:
            device: Where it arrives.
            later: How many other completions come in between.
        """
        name = "repeat update" if later else "double update"
        self._tamper(device, name, Tamper(CompletionKind.UPDATE, 2, later=later))

    def _tamper(self, device: SimDevice, name: str, tamper: Tamper) -> None:
        device.tampers.append(tamper)
        self._tampers.append((name, tamper))

    def stray_completion(self, pair: SimQueuePair, wr_id: int) -> None:
        """Tell of a publish that nobody posted."""
        self._network.note(f"{pair}: completion of an unknown publish {wr_id:#x}")
        pair.device.complete(Completion(CompletionKind.PUBLISH, pair, wr_id=wr_id))

    def stray_update(self, pair: SimQueuePair, update: Update) -> None:
        """Tell of an update that the peer never published."""
        self._network.note(f"{pair}: stray update to {update.alert_token:#x}")
        pair.device.complete(Completion(CompletionKind.UPDATE, pair, payload=update))

    # Devices

    def remove(self, device: SimDevice, *, is_noticed: bool = True) -> None:
        """Take a device away; nothing can be had from it any more.

        Args:
            device: Which one.
            is_noticed: True when its own process gets DOWN for every queue pair; False
                when that process is gone with it. The peers find out by themselves: at
                the next thing that they post, when their retries end.
        """
        self._network.note(f"{device}: gone")
        device.is_gone = True
        for domain in list(device.domains):
            for pair in list(domain.queue_pairs):
                pair.outgoing.items.clear()
                if is_noticed:
                    pair.go_down(Status.PEER_GONE, "the device is gone")
                else:
                    pair.die()
