"""What the scenarios of the lab share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).resolve().parent


def _load(name: str) -> None:
    """Load a helper under the name that test modules import."""
    qualified = f"tests.lab.{name}"
    if qualified not in sys.modules:
        spec = importlib.util.spec_from_file_location(qualified, HERE / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[qualified] = module
        spec.loader.exec_module(module)


for _name in (
    "capture",
    "wire_log",
    "network_faults",
    "streaming",
    "measuring",
    "ends",
    "smc_netlink",
    "kernel_smc",
    "matrix",
    "players",
    "playing",
    "odd_clc",
    "odd_ends",
    "smc_cgroup",
):
    _load(_name)

from pysmc.discovery.option.install import attach  # noqa: E402  # loaded just now
from pysmc.discovery.option.sockets import is_installed  # noqa: E402
from tests.lab.ends import Ends, Place  # noqa: E402  # loaded just now
from tests.lab.kernel_smc import Kernel  # noqa: E402
from tests.lab.odd_ends import Meetings, OddPlayer  # noqa: E402


@pytest.fixture
def place() -> Place:
    """Where the two ends are."""
    return Place.here()


@pytest.fixture
def ends(place) -> Iterator[Ends]:
    """Start ends; see `tests.lab.ends`."""
    with Ends(place) as started:
        yield started


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """The kernel's own SMC, ready to be a peer; see `tests.lab.kernel_smc`."""
    with Kernel() as prepared:
        yield prepared


@pytest.fixture
def option() -> None:
    """The programs for the TCP option are attached, for every process of the guest."""
    if not is_installed():
        attach()  # to the root of all cgroups: it stays until the guest ends


@pytest.fixture
def meetings(place, option) -> Iterator[Meetings]:
    """Bring an end of ours and one of the kernel together; see `tests.lab.odd_ends`."""
    with Ends(place, OddPlayer) as started:
        yield Meetings(started)
