"""The tables of the kernel's SMC, as it shows them to everybody: PNETIDs and UEIDs.

Decides nothing. The families of generic netlink are listed and not looked up by name:
to look one up that is not there would load its module.

Source: kernel `include/uapi/linux/smc.h`, `genetlink.h`; smc_pnet.c, smc_clc.c.
"""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, NamedTuple

from pysmc.fabric.netlink_messages import DUMP, Questions, parse_attributes

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Pnetid", "Tables", "read_tables"]

NETLINK_GENERIC = 16
"""The socket module does not name it."""
_HEADER = struct.Struct("=BBH")  # command, version, reserved
_FAMILY_ID = struct.Struct("=H")
_CONTROL, _GET_FAMILY = 16, 3
_ATTR_FAMILY_ID, _ATTR_FAMILY_NAME = 1, 2

_PNETIDS, _GET_PNETID = b"SMC_PNETID", 1
_NAME, _NETDEV, _RDMA_DEVICE, _RDMA_PORT = 1, 2, 3, 4
_GENERAL, _DUMP_UEID = b"SMC_GEN_NETLINK", 9
_NO_NAME = b"n/a\0"
_UEID_ENTRY = 1


class Pnetid(NamedTuple):
    """One row of the PNETID table: a network and one device in it."""

    name: str
    """Up to 16 characters."""
    device: str
    """A network device, or an RDMA device with its port as ``rxe0:1``."""


class Tables(NamedTuple):
    """What the kernel's SMC is told by its administrator, in this network namespace."""

    pnetids: list[Pnetid] | None
    """None when the kernel does not show them."""
    ueids: list[str] | None
    """At most four; None when the kernel does not show them."""


def read_tables() -> Tables:
    """Ask the kernel for both tables.

    Raises:
        OSError: There is no descriptor left, or netlink is forbidden here.
    """
    with contextlib.closing(Questions(NETLINK_GENERIC)) as kernel:
        families = dict(_families(kernel))
        pnetids = ueids = None
        if _PNETIDS in families:
            rows = _dump(kernel, families[_PNETIDS], _GET_PNETID)
            pnetids = [_pnetid(row) for row in rows]
        if _GENERAL in families:
            rows = _dump(kernel, families[_GENERAL], _DUMP_UEID)
            ueids = [_text(row[_UEID_ENTRY]) for row in rows if _UEID_ENTRY in row]
        return Tables(pnetids, ueids)


def _families(kernel: Questions) -> Iterator[tuple[bytes, int]]:
    for row in _dump(kernel, _CONTROL, _GET_FAMILY):
        name = row.get(_ATTR_FAMILY_NAME, b"").rstrip(b"\0")
        number = row.get(_ATTR_FAMILY_ID, b"")
        if len(number) == _FAMILY_ID.size:
            yield name, _FAMILY_ID.unpack(number)[0]


def _dump(kernel: Questions, family: int, command: int) -> Iterator[dict[int, bytes]]:
    """Give the attributes of each answer of a dump."""
    question = _HEADER.pack(command, 1, 0)
    for kind, answer in kernel.ask(family, DUMP, question):
        if kind == family:
            yield parse_attributes(answer, _HEADER.size)


def _pnetid(row: dict[int, bytes]) -> Pnetid:
    # A row is about one of the two; in the other's place the kernel says "n/a".
    device = _text(row.get(_NETDEV, _NO_NAME))
    if device == _text(_NO_NAME):
        port = row.get(_RDMA_PORT, b"\0")[0]
        device = f"{_text(row.get(_RDMA_DEVICE, b''))}:{port}"
    return Pnetid(_text(row.get(_NAME, b"")), device)


def _text(value: bytes) -> str:
    text = value.partition(b"\0")[0].decode("ascii", "replace")
    return "".join(c if c.isprintable() else "?" for c in text).rstrip()
