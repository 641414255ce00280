"""What holds for every test: Hypothesis profiles, and what a test may demand."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from pysmc.testing.invariants import Watch

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest_plugins = [
    "house_gate",
    "interop_matrix",
    "lab.plugin",
    "lab.report",
    "long_runs",
]

# No deadline in any profile: how long an example takes depends on the machine, and
# tests that bound a time say so and measure it themselves.
settings.register_profile("dev", max_examples=60, deadline=None)
settings.register_profile(
    "ci", max_examples=100, deadline=None, derandomize=True, print_blob=True
)
settings.register_profile(
    "nightly",
    max_examples=3000,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev")
)


@cache
def _network_namespaces_missing() -> str:
    """Say why tests cannot make network namespaces here; empty when they can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    for program, package in (("ip", "iproute2"), ("nft", "nftables")):
        if shutil.which(program) is None:
            return f"needs the program {program}: apt-get install -y {package}"
    probe = subprocess.run(
        ["unshare", "--net", "true"], capture_output=True, check=False
    )
    if probe.returncode != 0:
        return "needs the right to make network namespaces (unshare --net fails)"
    return ""


EXHAUSTIVE = tuple(Path(__file__).parent / name for name in ("model", "simulation"))
"""Folders whose tests explore very many states: under coverage they would take long."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent in EXHAUSTIVE:
            item.add_marker("exhaustive")
        if item.get_closest_marker("netns") and _network_namespaces_missing():
            item.add_marker(pytest.mark.skip(reason=_network_namespaces_missing()))


@pytest.fixture(scope="session")
def _watch() -> Iterator[Watch]:
    watch = Watch()
    watch.install()
    yield watch
    watch.remove()


@pytest.fixture(autouse=True)
def invariants(_watch: Watch) -> Iterator[Watch]:
    """Fail the test in which an invariant of drivers or transports is broken.

    A test that breaks one on purpose takes what was found (`Watch.take`).
    """
    yield _watch
    found = _watch.take()
    if found:
        pytest.fail("\n\n".join(map(str, found)), pytrace=False)


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """Let gc.collect() look only at what is made from here on.

    All that tests have imported is a tenth of a second each time.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def quiet() -> Iterator[None]:
    """Log nothing: faults are, a line each, and here they are wanted."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def option(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have the TCP option installed, as far as its socket calls show."""
    path = Path(__file__).with_name("fake_option.py")
    spec = importlib.util.spec_from_file_location("tests.fake_option", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FakeOption(monkeypatch)
