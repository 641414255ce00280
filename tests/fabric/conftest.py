"""Pairs of devices for the checks of the contract."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pysmc.disposal import wait_unmapped
from pysmc.fabric.base import UpdateCodec
from pysmc.fabric.shm import ShmDevice
from pysmc.fabric.sim import SimNetwork
from smcproto import cdc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from pysmc.fabric.base import Device
    from pysmc.fabric.shm import ShmDomain
    from pysmc.testing.conformance import MakePair
    from tests.fabric.fake_verbs import Roce
    from tests.fabric.rawpeer import RawPeer

    Pair = tuple[Device, Device, Callable[[], object]]


def _load(name: str) -> ModuleType:
    """Load a helper that lies beside, under the name that test modules import."""
    qualified = f"tests.fabric.{name}"
    if qualified in sys.modules:
        return sys.modules[qualified]
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(qualified, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    spec.loader.exec_module(module)
    return module


# The tests are no package, so that nobody else would find them.
_load("standin")
_load("rawpeer")
_load("hostile_lines")
_load("hostile_catalogue")
_load("hostile_memory")
_load("hostile_lies")
_load("fake_verbs")
_load("fake_pyverbs")


def _remote_device() -> Device:
    device: Device = _load("standin").RemoteDevice()
    return device


@contextmanager
def shm_pair() -> Iterator[Pair]:
    device_a, device_b = ShmDevice(os.urandom(8)), ShmDevice(os.urandom(8))
    try:
        yield device_a, device_b, lambda: None
    finally:
        device_a.close()
        device_b.close()


@contextmanager
def shm_remote_pair() -> Iterator[Pair]:
    device_a, device_b = ShmDevice(os.urandom(8)), _remote_device()
    try:
        yield device_a, device_b, lambda: None
    finally:
        device_a.close()
        device_b.close()


@pytest.fixture(autouse=True)
def unmapped() -> Iterator[None]:
    """What a test leaves to a thread is gone before the next one counts."""
    yield
    assert wait_unmapped(30)


@pytest.fixture
def device() -> Iterator[ShmDevice]:
    """A shm device of this process."""
    device = ShmDevice(os.urandom(8))
    yield device
    device.close()


@pytest.fixture
def domain(device: ShmDevice) -> ShmDomain:
    """A protection domain of that device."""
    return device.create_domain()


@pytest.fixture
def peer() -> Iterator[RawPeer]:
    """A peer that speaks by hand."""
    peer = _load("rawpeer").RawPeer()
    yield peer
    peer.close()


@pytest.fixture
def make_shm_pair() -> MakePair:
    """Two shm devices in this process."""
    return shm_pair


@pytest.fixture
def make_remote_pair() -> MakePair:
    """A shm device here and one in a child process."""
    return shm_remote_pair


@contextmanager
def _sim_pair(seed: int, *, newest_only: bool, auto: bool = False) -> Iterator[Pair]:
    codec = UpdateCodec(cdc.pack, cdc.unpack, lambda data: data[:1] == b"\xfe")
    network = SimNetwork(seed, codec=codec, newest_only=newest_only, auto=auto)
    device_a, device_b = network.device(b"sim-prA0"), network.device(b"sim-prB0")

    def pump() -> None:
        for _ in range(4):
            network.step()

    try:
        yield device_a, device_b, pump
    finally:
        device_a.close()
        device_b.close()


@pytest.fixture(params=["every", "newest_only", "auto"])
def make_sim_pair(request: pytest.FixtureRequest) -> MakePair:
    """Two simulated devices, in each of the ways that a network can work."""
    return partial(
        _sim_pair,
        7,
        newest_only=request.param == "newest_only",
        auto=request.param == "auto",
    )


@contextmanager
def verbs_pair() -> Iterator[Pair]:
    roce: Roce = _load("fake_verbs").Roce()
    try:
        yield roce.devices[0], roce.devices[1], roce.world.run
    finally:
        roce.close()


@pytest.fixture
def roce() -> Iterator[Roce]:
    """Two verbs devices on an imitation of the verbs library."""
    roce: Roce = _load("fake_verbs").Roce()
    yield roce
    roce.close()


@pytest.fixture
def make_verbs_pair() -> MakePair:
    """Two verbs devices on an imitation of the verbs library."""
    return verbs_pair


@pytest.fixture
def forget() -> Iterator[None]:
    """What an imitation of pyverbs left in the interpreter goes with the test."""
    before = {name: sys.modules[name] for name in sys.modules if "pyverbs" in name}
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "pyverbs"]:
        if sys.modules[name] is not before.get(name):
            del sys.modules[name]
    sys.modules.update(before)
