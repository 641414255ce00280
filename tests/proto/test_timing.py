"""No input of 64 KiB or less takes a decoder 200 microseconds.

A hostile peer chooses the bytes, so the bound is about the worst of them. Measured is
the best of several runs, so that a busy machine does not fail the test: what is left
is the work itself.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

import pytest

from smcproto import cdc, clc, llc, tcp_option
from smcproto.constants import EYECATCHER_SMCR, PathType
from smcproto.decode import decode
from smcproto.errors import DecodeError

BOUND_US = 200
ROUNDS = 40
LARGEST = 65536


def proposal() -> bytes:
    """Every part, each at its largest: 652 bytes."""
    return clc.Proposal(
        version=2,
        peer_id=bytes(8),
        gid=bytes(16),
        mac=bytes(6),
        typev1=PathType.BOTH,
        typev2=PathType.BOTH,
        ip_area=clc.IpArea(ipv6_prefixes=(clc.Ipv6Prefix(bytes(16), 64),) * 8),
        v2=clc.ProposalExtension(
            eids=("A" * 32,) * 8,
            release=1,
            gid=bytes(16),
            smcd=clc.SmcdExtension("S" * 32, (clc.IsmGid(1, 2),) * 8),
        ),
    ).build()


def confirm() -> bytes:
    """First contact, with as many GIDs as fit in: 1012 bytes."""
    contact = clc.FirstContactExtension(
        direct=True, os_type=2, release=1, host_name="h" * 32
    )
    return clc.Confirm(
        version=2,
        first_contact=True,
        peer_id=bytes(8),
        gid=bytes(16),
        mac=bytes(6),
        qp_number=1,
        rkey=1,
        rmbe_index=1,
        alert_token=1,
        rmbe_size_code=1,
        mtu_code=1,
        virtual_address=1,
        psn=1,
        v2=clc.ConfirmExtension("E" * 32, contact, (bytes(16),) * 53),
    ).build()


def add_link() -> bytes:
    """255 keys: 4152 bytes."""
    return llc.AddLink(
        version=2,
        response=False,
        mac=bytes(6),
        gid=bytes(16),
        qp_number=1,
        link_number=1,
        mtu_code=1,
        psn=1,
        client_target_gid=bytes(16),
        rkeys=tuple(llc.RkeyPair(n, n, n) for n in range(255)),
    ).build()


def flood(head: bytes) -> bytes:
    return head.ljust(LARGEST, b"\xff")


Parser = Callable[[bytes], object]

WORST: list[tuple[str, Parser, bytes]] = [
    ("largest Proposal", clc.parse, proposal()),
    ("largest Confirm", clc.parse, confirm()),
    ("ADD LINK, 255 keys", llc.parse, add_link()),
    ("DELETE RKEY, 255 keys", llc.parse,
     llc.DeleteRkey(2, False, tuple(range(255))).build()),
    ("REQUEST ADD LINK, 255 GIDs", llc.parse,
     llc.RequestAddLink(False, (bytes(16),) * 255).build()),
    ("DELETE RKEY, 8 KiB", llc.parse, b"\x29".ljust(8192, b"\xff")),
    ("ADD LINK, 8 KiB", llc.parse, b"\x22".ljust(8192, b"\xff")),
    ("CDC", cdc.CdcMessage.parse, b"\xfe\x2c" + b"\xff" * 42),
    ("CDC, fast", cdc.unpack, b"\xfe\x2c" + b"\xff" * 42),
    ("40 NOPs", tcp_option.SmcOption.parse, b"\1" * 34 + bytes.fromhex("fe06e2d4c3d9")),
    *(
        (f"64 KiB, {name}", parse, flood(head))
        for name, parse, head in (
            ("CLC declares 65535", clc.parse, EYECATCHER_SMCR + b"\1\xff\xff\x20"),
            ("CLC declares 652", clc.parse, EYECATCHER_SMCR + b"\1\x02\x8c\x20"),
            ("CLC without eye catcher", clc.parse, b""),
            ("LLC ADD LINK", llc.parse, b"\x22"),
            ("LLC unknown", llc.parse, b"\x7f"),
            ("CDC", cdc.CdcMessage.parse, b"\xfe\x2c"),
            ("CDC, fast", cdc.unpack, b"\xfe\x2c"),
            ("TCP options", tcp_option.SmcOption.parse, b"\1\1"),
            ("decode", decode, b"\1"),
            ("decode, CLC", decode, EYECATCHER_SMCR + b"\1\xff\xff\x20"),
        )
    ),
]  # fmt: skip


def best_us(parse: Parser, data: bytes) -> float:
    """Give the shortest time that one call took, in microseconds."""

    def call() -> None:
        try:
            parse(data)
        except DecodeError:
            return

    return 1e6 * min(timeit.repeat(call, number=1, repeat=ROUNDS))


@pytest.mark.parametrize(
    ("parse", "data"),
    [row[1:] for row in WORST],
    ids=[row[0] for row in WORST],
)
def test_the_worst_inputs_stay_within_the_bound(parse, data, proto):
    assert len(data) <= LARGEST
    with proto.untraced():
        assert best_us(parse, data) < BOUND_US


def test_every_vector_stays_within_the_bound(vector, proto):
    data = bytes.fromhex(vector["hex"])
    with proto.untraced():
        assert best_us(proto.parsers[vector["plane"]], data) < BOUND_US


def test_refusals_stay_within_the_bound(invalid_vector, proto):
    data = bytes.fromhex(invalid_vector["hex"])
    with proto.untraced():
        assert best_us(proto.parsers[invalid_vector["plane"]], data) < BOUND_US
