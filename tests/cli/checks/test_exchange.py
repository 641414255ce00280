"""The exchange: over every fabric that is here, and each way in which it can fail."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

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


def test_as_a_program(capsys):
    assert main(["shm", str(SECONDS)]) == 0
    assert capsys.readouterr().out == ""


def test_as_a_program_that_fails(capsys, monkeypatch):
    def open_device(*args, **options):
        raise FabricUnavailable("open the shm fabric", "UNAVAILABLE", "not here")

    monkeypatch.setattr("pysmc.fabric.open_device", open_device)
    assert main(["shm", "1"]) == 1
    assert "not here" in capsys.readouterr().out


@pytest.mark.slow
def test_in_a_process_of_its_own(environment):
    command = [sys.executable, "-m", "pysmc.cli.checks.exchange", "shm", "10"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
