"""Programs in a BPF file system, for somebody else to attach."""

from __future__ import annotations

import errno

import pytest

from pysmc.discovery.option.bpf import BpfError
from pysmc.discovery.option.machine import Machine
from pysmc.discovery.option.pins import pin, unpin

NAMES = ["getsockopt", "setsockopt", "sock_ops"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_pin_and_unpin(bpf, tmp_path):
    folder = tmp_path / "smc"
    assert pin(folder, bpf=bpf)
    assert names(folder) == NAMES
    assert unpin(folder) == 3
    assert not folder.exists()
    assert unpin(folder) == 0


def test_a_second_time_nothing_happens(fake, bpf, tmp_path):
    assert pin(tmp_path, bpf=bpf)
    assert not pin(tmp_path, bpf=bpf)
    assert fake.calls.count("OBJ_PIN") == 3


def test_others_are_replaced(fake, bpf, tmp_path):
    assert pin(tmp_path, bpf=bpf, machine=Machine("x86_64", 64, "little", 8192))
    (tmp_path / "somebody_elses").touch()
    assert pin(tmp_path, bpf=bpf)
    assert names(tmp_path) == [*NAMES, "somebody_elses"]
    assert unpin(tmp_path) == 3
    assert names(tmp_path) == ["somebody_elses"]


@pytest.mark.parametrize("step", range(3))
def test_all_or_nothing(fake, bpf, tmp_path, step):
    fake.fails["OBJ_PIN"] = [None] * step + [errno.EPERM]
    with pytest.raises(BpfError, match="pin the program as .*EPERM"):
        pin(tmp_path / "smc", bpf=bpf)
    assert names(tmp_path) == []


def test_no_folder_above(bpf, tmp_path):
    with pytest.raises(FileNotFoundError):
        pin(tmp_path / "nowhere" / "smc", bpf=bpf)
