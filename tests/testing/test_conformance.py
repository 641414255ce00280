"""The checks of the fabric contract notice a fabric that breaks it."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.fabric.base import Completion, CompletionKind, Status, Update
from pysmc.fabric.sim import SimDevice, SimDomain, SimNetwork, SimQueuePair, SimRegion
from pysmc.testing import CHECKS, ConformanceFailure, check_device
from pysmc.testing.conformance import REMOTE_CHECKS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Patch = pytest.MonkeyPatch


@contextmanager
def make_pair() -> Iterator[tuple[SimDevice, SimDevice, Callable[[], object]]]:
    network = SimNetwork(3)
    device_a, device_b = network.device(b"device-A"), network.device(b"device-B")

    def pump() -> None:
        for _ in range(4):
            network.step()

    try:
        yield device_a, device_b, pump
    finally:
        device_a.close()
        device_b.close()


def test_a_fabric_that_keeps_the_contract_passes() -> None:
    check_device(make_pair)


def test_every_check_has_a_name_and_says_what_it_holds() -> None:
    names = [name for name, _ in CHECKS]
    assert len(set(names)) == len(names) >= 25
    for name, check in CHECKS:
        assert (check.__doc__ or "").endswith("."), name
    assert set(names) > REMOTE_CHECKS


def test_the_failure_names_the_check(monkeypatch: Patch) -> None:
    monkeypatch.setattr(SimDevice, "__init__", _init_without_gid)
    with pytest.raises(ConformanceFailure, match="identity: a GID has 16 bytes"):
        check_device(make_pair)


_real_init = SimDevice.__init__


def _init_without_gid(self: SimDevice, network: SimNetwork, peer_id: bytes) -> None:
    _real_init(self, network, peer_id)
    self.gid = b"short"


# Each breaks one rule, and the check that must notice has its name before it.

_complete = SimDevice.complete
_receive = SimQueuePair.receive
_post_write = SimQueuePair.post_write
_write_arrives = SimQueuePair._write_arrives
_publish = SimQueuePair.publish
_poll = SimDevice.poll
_close = SimQueuePair.close
_register = SimDomain.register


def drops(kind: CompletionKind) -> Callable[[Patch], None]:
    def patch(monkeypatch: Patch) -> None:
        def complete(self: SimDevice, completion: Completion) -> None:
            if completion.kind is not kind:
                _complete(self, completion)

        monkeypatch.setattr(SimDevice, "complete", complete)

    return patch


def doubles(kind: CompletionKind) -> Callable[[Patch], None]:
    def patch(monkeypatch: Patch) -> None:
        def complete(self: SimDevice, completion: Completion) -> None:
            _complete(self, completion)
            if completion.kind is kind:
                _complete(self, completion)

        monkeypatch.setattr(SimDevice, "complete", complete)

    return patch


def reverses(monkeypatch: Patch) -> None:
    monkeypatch.setattr(SimDevice, "poll", lambda self: _poll(self)[::-1])


def shifts_writes(monkeypatch: Patch) -> None:
    def post_write(self: SimQueuePair, rkey: int, address: int, data: Any) -> None:
        _post_write(self, rkey, address + (len(data) == 1), data)

    monkeypatch.setattr(SimQueuePair, "post_write", post_write)


def accepts_any_address(monkeypatch: Patch) -> None:
    def write_arrives(
        self: SimQueuePair, peer: SimQueuePair, rkey: int, address: int, data: bytes
    ) -> None:
        if peer.region_at(rkey, address, len(data)) is not None:
            _write_arrives(self, peer, rkey, address, data)
        else:
            for region in peer.device.domains[-1].regions.values():
                region.memory[: len(data)] = data

    monkeypatch.setattr(SimQueuePair, "_write_arrives", write_arrives)


def gives_the_same_memory_twice(monkeypatch: Patch) -> None:
    def register(self: SimDomain, length: int) -> SimRegion:
        region = _register(self, length)
        for other in self.regions.values():
            if other.length == length:
                region.memory = other.memory
        return region

    monkeypatch.setattr(SimDomain, "register", register)


def swallows_bad_writes(monkeypatch: Patch) -> None:
    def post_write(self: SimQueuePair, rkey: int, address: int, data: Any) -> None:
        assert self.peer is not None
        if self.peer.region_at(rkey, address, len(data)) is not None:
            _post_write(self, rkey, address, data)

    monkeypatch.setattr(SimQueuePair, "post_write", post_write)


def forgets_the_last_update(monkeypatch: Patch) -> None:
    def publish(self: SimQueuePair, *arguments: int) -> bool:
        return arguments[2] % 10 == 0 or _publish(self, *arguments)

    monkeypatch.setattr(SimQueuePair, "publish", publish)


def garbles_updates(monkeypatch: Patch) -> None:
    def receive(self: SimQueuePair, payload: Any) -> None:
        if isinstance(payload, Update):
            payload = payload._replace(consumer=payload.consumer & 0xFFFFFFFF)
        _receive(self, payload)

    monkeypatch.setattr(SimQueuePair, "receive", receive)


def writes_late(monkeypatch: Patch) -> None:
    def post_write(self: SimQueuePair, rkey: int, address: int, data: Any) -> None:
        taken, streams = bytes(data), self.answers
        assert self.peer is not None
        peer = self.peer
        self.network.post(
            streams, "late", lambda: self._write_arrives(peer, rkey, address, taken)
        )

    monkeypatch.setattr(SimQueuePair, "post_write", post_write)


def arms_blindly(monkeypatch: Patch) -> None:
    def arm(self: SimDevice) -> bool:
        self.fileno()
        self._armed = True
        return True

    monkeypatch.setattr(SimDevice, "arm", arm)


def never_rings(monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "eventfd_write", lambda descriptor, value: None)


def never_falls_silent(monkeypatch: Patch) -> None:
    monkeypatch.setattr(SimDevice, "_silence", lambda self: None)


def goes_down_by_its_own_close(monkeypatch: Patch) -> None:
    def close(self: SimQueuePair, *, linger: bool = False) -> None:
        was_open = self.is_open
        _close(self, linger=linger)
        if was_open:
            down = Completion(CompletionKind.DOWN, self, Status.PEER_GONE)
            self.device.complete(down)

    monkeypatch.setattr(SimQueuePair, "close", close)


def hands_out_used_memory(monkeypatch: Patch) -> None:
    def register(self: SimDomain, length: int) -> SimRegion:
        region = _register(self, length)
        region.view[-1] = 1
        return region

    monkeypatch.setattr(SimDomain, "register", register)


def works_in_a_child(monkeypatch: Patch) -> None:
    monkeypatch.setattr(SimDevice, "refuse_if_forked", lambda self: None)


def leaks_descriptors(monkeypatch: Patch) -> None:
    def create(self: SimDevice) -> SimDomain:
        leaked.append(os.dup(0))
        return _create_domain(self)

    monkeypatch.setattr(SimDevice, "create_domain", create)


_create_domain = SimDevice.create_domain
leaked: list[int] = []


def connects_to_anybody(monkeypatch: Patch) -> None:
    def connected_later(self: SimQueuePair, status: Status, text: str) -> None:
        self.network.post(
            self.answers, "connect", lambda: self._connected(Status.SUCCESS, text)
        )

    monkeypatch.setattr(SimQueuePair, "connected_later", connected_later)


BROKEN: list[tuple[str, Callable[[Patch], None]]] = [
    ("connect", drops(CompletionKind.CONNECTED)),
    ("connect", doubles(CompletionKind.CONNECTED)),
    ("connect_to_nobody", connects_to_anybody),
    ("connect_to_a_wrong_number", connects_to_anybody),
    ("loopback", drops(CompletionKind.RECEIVE)),
    ("sends", doubles(CompletionKind.RECEIVE)),
    ("sends", reverses),
    ("write", shifts_writes),
    ("write_out_of_bounds", accepts_any_address),
    ("write_out_of_bounds", swallows_bad_writes),
    ("unknown_rkey", accepts_any_address),
    ("order", writes_late),
    ("newest_update", forgets_the_last_update),
    ("newest_update", garbles_updates),
    ("coalescing", forgets_the_last_update),
    ("send_and_update_order", reverses),
    ("publish_completes", drops(CompletionKind.PUBLISH)),
    ("publish_completes", doubles(CompletionKind.PUBLISH)),
    ("arm", arms_blindly),
    ("arm", never_rings),
    ("arm", never_falls_silent),
    ("no_lost_wakeup", arms_blindly),
    ("own_news_wakes", never_rings),
    ("down", drops(CompletionKind.DOWN)),
    ("down", doubles(CompletionKind.DOWN)),
    ("down", goes_down_by_its_own_close),
    ("region_reuse", hands_out_used_memory),
    ("isolation", accepts_any_address),
    ("rkeys_per_link", shifts_writes),
    ("many_regions", gives_the_same_memory_twice),
    ("fork", works_in_a_child),
    ("descriptor_balance", leaks_descriptors),
]


@pytest.mark.parametrize(
    ("name", "broken"),
    BROKEN,
    ids=[f"{name}-{broken.__qualname__.split('.')[0]}" for name, broken in BROKEN],
)
def test_a_broken_rule_is_noticed(
    name: str, broken: Callable[[Patch], None], monkeypatch: Patch
) -> None:
    check = dict(CHECKS)[name]
    with monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises(ConformanceFailure) as caught:
            check(make_pair)
    assert str(caught.value)
    while leaked:
        os.close(leaked.pop())
