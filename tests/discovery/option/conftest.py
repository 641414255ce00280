"""A fake kernel for bpf(2), and a place for a process that is none of this machine."""

from __future__ import annotations

import pytest

from pysmc.discovery.option.bpf import Bpf
from pysmc.discovery.option.machine import this_machine
from tests.discovery.option.fake_bpf import FakeBpf


@pytest.fixture
def fake():
    kernel = FakeBpf()
    yield kernel
    assert kernel.leaked() == []


@pytest.fixture
def bpf(fake):
    return Bpf(fake)


@pytest.fixture
def machine():
    return this_machine()


@pytest.fixture
def cgroup(tmp_path):
    path = tmp_path / "service"
    path.mkdir()
    return path
