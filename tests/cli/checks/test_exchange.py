"""The exchange: over every fabric that is here, and each way in which it can fail."""

from __future__ import annotations

import contextlib
import os

import pytest

from pysmc.cli.checks.exchange import ExchangeFailed, exchange, main
from pysmc.errors import FabricUnavailable
from pysmc.fabric.base import Completion, CompletionKind, Status
from pysmc.fabric.shm import ShmDevice
from pysmc.fabric.sim import SimNetwork

SECONDS = 10


@contextlib.contextmanager
def shm_devices():
    ids = os.urandom(8), os.urandom(8)
    first, second = ShmDevice(ids[0]), ShmDevice(ids[1])
    try:
        yield (first, second), ids
    finally:
        first.close()
        second.close()


def test_over_shared_memory():
    with shm_devices() as (devices, ids):
        exchange(devices, ids, SECONDS)
        assert [device.domains for device in devices] == [[], []]
        exchange(devices, ids, SECONDS)


def test_a_device_with_itself():
    with shm_devices() as (devices, ids):
        exchange((devices[0], devices[0]), (ids[0], ids[0]), SECONDS)


def sim_devices():
    network = SimNetwork(1, auto=True)
    ids = b"doctor-A", b"doctor-B"
    return (network.device(ids[0]), network.device(ids[1])), ids, SECONDS


def test_over_the_simulated_fabric():
    exchange(*sim_devices())


def test_a_peer_that_cannot_be_found():
    with shm_devices() as (devices, ids), pytest.raises(ExchangeFailed) as failed:
        exchange(devices, (ids[0], bytes(8)), SECONDS)
    assert "unreachable" in str(failed.value)


def test_an_exchange_that_takes_too_long():
    with shm_devices() as (devices, ids), pytest.raises(ExchangeFailed) as failed:
        exchange(devices, ids, 0)
    assert str(failed.value) == "the queue pairs did not connect within 0 s"


def test_a_write_that_is_not_there(monkeypatch):
    def post_write(self, rkey, address, data):
        """Lose it."""

    monkeypatch.setattr("pysmc.fabric.sim.SimQueuePair.post_write", post_write)
    with pytest.raises(ExchangeFailed) as failed:
        exchange(*sim_devices())
    assert "not what was written" in str(failed.value)


def test_a_completion_that_failed(monkeypatch):
    real = ShmDevice.poll

    def poll(self):
        return [
            Completion(item.kind, item.queue_pair, Status.FLUSHED, payload="gone")
            if item.kind is CompletionKind.UPDATE
            else item
            for item in real(self)
        ]

    monkeypatch.setattr(ShmDevice, "poll", poll)
    with shm_devices() as (devices, ids), pytest.raises(ExchangeFailed) as failed:
        exchange(devices, ids, SECONDS)
    assert str(failed.value) == "update: flushed (gone)"


@pytest.fixture
def over_shm(monkeypatch):
    """Have the program find any port, and open shared memory for it."""
    names = []

    def open_device(name, *, peer_id, config, codec, port):
        names.append((name, port))
        return ShmDevice(peer_id)

    monkeypatch.setattr("pysmc.fabric.open_device", open_device)
    monkeypatch.setattr(
        "pysmc.cli.checks.exchange.read_port", lambda *words: ":".join(map(str, words))
    )
    return names


def test_as_a_program(over_shm, capsys):
    assert main([str(SECONDS), "rxe0:1:1", "rxe1:1:0"]) == 0
    assert capsys.readouterr().out == "\n\n"
    assert over_shm == [("verbs", "rxe0:1:1")] * 2 + [("verbs", "rxe1:1:0")] * 2


def test_as_a_program_that_fails(over_shm, capsys, monkeypatch):
    opened: list[ShmDevice] = []

    def open_device(*args, peer_id, **options):
        if opened:
            raise FabricUnavailable("open the verbs fabric", "UNAVAILABLE", "not here")
        opened.append(ShmDevice(peer_id))
        return opened[0]

    monkeypatch.setattr("pysmc.fabric.open_device", open_device)
    before = os.listdir("/proc/self/fd")
    assert main(["1", "rxe0:1:1"]) == 0
    text = "open the verbs fabric: UNAVAILABLE (not here)"
    assert capsys.readouterr().out == f"{text}\n"
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_as_a_program_without_the_port(capsys):
    assert main(["1", "none0:1:0"]) == 0
    assert capsys.readouterr().out == "there is no RDMA port none0:1:0\n"
