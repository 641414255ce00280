"""Opening a device by its name."""

from __future__ import annotations

import os

import pytest

from pysmc.config import Config
from pysmc.errors import FabricUnavailable
from pysmc.fabric import open_device
from pysmc.fabric.base import UpdateCodec
from pysmc.fabric.shm import ShmDevice
from smcproto import cdc

CODEC = UpdateCodec(cdc.pack, cdc.unpack, lambda data: data[:1] == b"\xfe")


def test_shm_opens_with_the_users_of_the_configuration() -> None:
    config = Config(allowed_uids=(5, 6))
    peer_id = os.urandom(8)
    device = open_device("shm", peer_id=peer_id, config=config, codec=CODEC)
    assert isinstance(device, ShmDevice)
    assert device.peer_id == peer_id
    assert device.allowed_uids == (5, 6)
    device.close()


def test_elsewhere_than_on_linux_there_is_no_shm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(FabricUnavailable, match="needs Linux"):
        open_device("shm", peer_id=bytes(8), config=Config(), codec=CODEC)


@pytest.mark.parametrize(
    ("name", "why"),
    [("verbs", "route decides"), ("sim", "SimNetwork"), ("smoke", "no fabric")],
)
def test_others_say_what_is_missing(name: str, why: str) -> None:
    with pytest.raises(FabricUnavailable, match=why):
        open_device(name, peer_id=bytes(8), config=Config(), codec=CODEC)
