"""A real exchange over a fabric: two queue pairs, one write, one update.

Decides whether memory moves, by the fabric contract alone, so that it is the same for
every fabric. As a program (``python -m pysmc.cli.checks.exchange SECONDS PORT ...``)
it tries RDMA ports in a process of its own: what a driver or a library does to that one
is no harm to the doctor.

Source: pysmc.fabric.base.
"""

from __future__ import annotations

import os
import select
import sys
import time
from typing import TYPE_CHECKING

from pysmc.fabric.base import CompletionKind, RemoteQueuePair, Status
from pysmc.fabric.verbs_ports import read_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.fabric.base import Completion, Device, QueuePair
    from pysmc.fabric.verbs_ports import RdmaPort

__all__ = ["ExchangeFailed", "exchange"]

REGION_BYTES = 16 * 1024
TEXT = b"written by the doctor"
PRODUCER = len(TEXT)
TOKEN = 0x0D0C
PSNS = 0x111, 0x222
PAUSE = 0.05
"""Longest sleep in seconds; a device may look at some things only by itself."""


class ExchangeFailed(Exception):
    """The exchange did not come to its end; the text says at which step."""


def exchange(
    devices: tuple[Device, Device], peer_ids: tuple[bytes, bytes], seconds: float
) -> None:
    """Write from one device into the memory of another one and read it there.

    Args:
        devices: Two open devices; they stay the caller's. May be the same one twice.
        peer_ids: 8 bytes each.
        seconds: How long everything together may take.

    Raises:
        ExchangeFailed: A step failed or took too long.
        FabricError: A device lacks what is needed.
    """
    deadline = time.monotonic() + seconds
    domains = [device.create_domain() for device in devices]
    try:
        region = domains[1].register(REGION_BYTES)
        pairs = [domain.create_queue_pair() for domain in domains]
        seen: list[Completion] = []

        def until(done: Callable[[Completion], bool], step: str) -> Completion:
            return _until(devices, seen, done, f"{step} within {seconds:g} s", deadline)

        for own, other in ((1, 0), (0, 1)):
            there = devices[other]
            remote = RemoteQueuePair(
                peer_ids[other],
                there.gid,
                there.mac,
                pairs[other].number,
                PSNS[other],
                there.mtu_code,
            )
            pairs[own].connect(remote, PSNS[own], passive=own == 1)
        for pair in pairs:
            until(_connected(pair), "the queue pairs did not connect")
        rkey = region.rkey_on(pairs[1])
        pairs[0].post_write(rkey, region.virtual_address, TEXT)
        pairs[0].publish(rkey, 1, 1, TOKEN, PRODUCER, 0, 0)
        pairs[0].flush()
        until(_updated(pairs[1]), "no update arrived")
        if bytes(region.view[: len(TEXT)]) != TEXT:
            message = "the update arrived, but not what was written before it"
            raise ExchangeFailed(message)
    finally:
        for domain in domains:
            domain.close()


def _connected(pair: QueuePair) -> Callable[[Completion], bool]:
    return lambda item: (
        item.queue_pair is pair and item.kind is CompletionKind.CONNECTED
    )


def _updated(pair: QueuePair) -> Callable[[Completion], bool]:
    return lambda item: (
        item.queue_pair is pair
        and item.kind is CompletionKind.UPDATE
        and item.payload.producer == PRODUCER
    )


def _until(
    devices: tuple[Device, Device],
    seen: list[Completion],
    done: Callable[[Completion], bool],
    step: str,
    deadline: float,
) -> Completion:
    """Poll until something completed; sleeps on the devices' descriptors."""
    while True:
        for device in devices:
            while completions := device.poll():
                seen += completions
        for item in seen:
            if item.status is not Status.SUCCESS:
                message = f"{item.kind.value}: {item.status.value} ({item.payload})"
                raise ExchangeFailed(message)
            if done(item):
                return item
        left = deadline - time.monotonic()
        if left <= 0:
            raise ExchangeFailed(step)
        if all(device.arm() for device in devices):
            select.select(devices, [], [], min(PAUSE, left))


def main(arguments: list[str]) -> int:
    """Try RDMA ports, and print one line for each: what went wrong, or nothing."""
    seconds = float(arguments[0])
    for name in arguments[1:]:
        print(_try(name, seconds), flush=True)
    return 0


def _try(name: str, seconds: float) -> str:
    from pysmc.aio.devices import CODEC
    from pysmc.config import Config
    from pysmc.errors import FabricError
    from pysmc.fabric import open_device

    peer_ids = os.urandom(8), os.urandom(8)
    opened: list[Device] = []
    try:
        port = _port(name)
        for peer_id in peer_ids:
            device = open_device(
                "verbs", peer_id=peer_id, config=Config(), codec=CODEC, port=port
            )
            opened.append(device)
        exchange((opened[0], opened[1]), peer_ids, seconds)
    except (ExchangeFailed, FabricError) as error:
        return str(error)
    finally:
        for device in opened:
            device.close()
    return ""


def _port(name: str) -> RdmaPort:
    """Find an RDMA port by its whole name (device:port:gid_index)."""
    device, port, index = name.split(":")
    found = read_port(device, int(port), int(index))
    if found is None:
        message = f"there is no RDMA port {name}"
        raise ExchangeFailed(message)
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
