"""The Proposal: parts in order, offsets that lead nowhere else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smcproto.clc_proposal import IpArea, Ipv6Prefix, Proposal
from smcproto.clc_v2 import IsmGid, ProposalExtension, SmcdExtension
from smcproto.constants import PathType
from smcproto.errors import DecodeError, EncodeError

V1 = Proposal(
    version=1,
    peer_id=bytes(range(8)),
    gid=bytes(range(16)),
    mac=bytes(range(6)),
    typev1=PathType.SMCR,
    typev2=PathType.NONE,
    ip_area=IpArea(bytes((192, 0, 2, 0)), 24),
)
EXTENSION = ProposalExtension(eids=("A",), release=1, gid=bytes(16))
V2 = replace(V1, version=2, typev1=PathType.NONE, typev2=PathType.SMCR, ip_area=None)
V2 = replace(V2, v2=EXTENSION)
PREFIX = Ipv6Prefix(bytes(16), 64)


def with_offset(data: bytes, at: int, offset: int) -> bytes:
    return data[:at] + offset.to_bytes(2, "big") + data[at + 2 :]


def resized(data: bytes) -> bytes:
    return data[:5] + len(data).to_bytes(2, "big") + data[7:]


@pytest.mark.parametrize(
    ("proposal", "size", "iparea_offset", "byte_7"),
    [
        (V1, 52, 0, 0x10),
        (replace(V1, version=2), 92, 40, 0x28),
        (replace(V1, version=2, typev2=PathType.SMCR, v2=EXTENSION), 164, 40, 0x20),
        (V2, 156, 0, 0x22),
        (replace(V1, ip_area=IpArea(ipv6_prefixes=(PREFIX,))), 69, 0, 0x10),
        (replace(V1, typev1=PathType.SMCD, ism_gid=1), 92, 40, 0x11),
    ],
)
def test_it_is_sent_as_linux_or_the_rfc_would(proposal, size, iparea_offset, byte_7):
    data = proposal.build()
    assert len(data) == size
    assert data[38:40] == iparea_offset.to_bytes(2, "big")
    assert data[7] == byte_7
    assert Proposal.parse(data) == proposal


def test_the_largest_one_has_652_bytes():
    extension = ProposalExtension(
        eids=("A" * 32,) * 8,
        release=1,
        gid=bytes(16),
        smcd=SmcdExtension("S" * 32, (IsmGid(1, 2),) * 8),
    )
    largest = replace(
        V1, version=2, typev1=PathType.BOTH, typev2=PathType.BOTH, v2=extension
    )
    largest = replace(largest, ip_area=IpArea(ipv6_prefixes=(PREFIX,) * 8))
    assert len(largest.build()) == 652
    assert Proposal.parse(largest.build()) == largest


def test_without_an_ip_area_the_offset_may_be_0_or_40():
    """Linux sends 0; reliability notes ask to accept both."""
    data = V2.build()
    other = with_offset(data, 38, 40)
    assert Proposal.parse(data).iparea_offset is None
    assert Proposal.parse(other) == replace(V2, iparea_offset=40)
    assert Proposal.parse(other).build() == other


@pytest.mark.slow
@pytest.mark.parametrize("base", ["C1", "C2", "C3", "C4", "C5", "K3", "K4"])
def test_every_iparea_offset_is_refused_or_harmless(base, proto):
    """CVE-2024-49571: the offset was followed unchecked."""
    data = proto.hex_of(base)
    usual = int.from_bytes(data[38:40], "big")
    accepted = []
    for offset in [*range(300), *range(300, 65536, 251), 65535]:
        try:
            found = Proposal.parse(with_offset(data, 38, offset))
        except DecodeError:
            continue
        accepted.append(offset)
        assert Proposal.parse(found.build()) == found
    assert set(accepted) == ({0, 40} if base in ("C5", "K4") else {usual})


@pytest.mark.slow
@pytest.mark.parametrize("base", ["C4", "C5", "K3", "K4", "S5"])
def test_every_v2_offset_is_refused_or_the_right_one(base, proto):
    """CVE-2024-49568: overlap with the fixed part, or reach beyond the message."""
    data = proto.hex_of(base)
    right = int.from_bytes(data[50:52], "big")
    for offset in [*range(700), *range(700, 65536, 251), 65535]:
        if offset == right:
            continue
        with pytest.raises(DecodeError):
            Proposal.parse(with_offset(data, 50, offset))


@pytest.mark.parametrize("count", range(256))
def test_every_prefix_count_is_held_against_the_bytes(count):
    """CVE-2024-49571, ipv6_prefixes_cnt: with as many prefixes as there are."""
    for there in (0, 1, 8, count):
        data = bytearray(V1.build()[:-4] + bytes(17 * there) + V1.build()[-4:])
        data[47] = count
        if len(data) <= 652 and count == there <= 8:
            found = Proposal.parse(resized(bytes(data)))
            assert found.ip_area is not None
            assert len(found.ip_area.ipv6_prefixes) == count
        else:
            with pytest.raises(DecodeError):
                Proposal.parse(resized(bytes(data)))


def test_a_growth_area_of_the_future_is_skipped():
    data = V1.build()
    grown = resized(with_offset(data[:40] + b"\xff" * 12 + data[40:], 38, 12))
    found = Proposal.parse(grown)
    assert found == replace(V1, iparea_offset=12)
    assert found.build() == resized(
        with_offset(data[:40] + bytes(12) + data[40:], 38, 12)
    )


def test_version_1_does_not_know_version_2_bits():
    """Reserved bits in RFC 7609 A.2.2: ignored when read."""
    data = bytearray(V1.build())
    data[7] |= 0x0C
    assert Proposal.parse(bytes(data)) == V1


def test_version_2_without_an_extension_is_read():
    """A server declines it with NO_V2_EXTENSION; it is no broken message."""
    bare = replace(V2, v2=None)
    assert len(bare.build()) == 84
    assert Proposal.parse(bare.build()) == bare


def test_an_smcr_peer_does_not_follow_the_smcd_offset(proto):
    """CVE-2024-47408."""
    data = bytearray(proto.hex_of("C5"))
    data[80 + 6 : 80 + 8] = b"\xff\xff"
    data[80 + 1] = 0xFF
    assert Proposal.parse(bytes(data)) == Proposal.parse(proto.hex_of("C5"))


def test_a_linux_client_without_a_version_1_path_sends_zeros(proto):
    found = Proposal.parse(proto.hex_of("K4"))
    assert (found.peer_id, found.gid, found.mac) == (bytes(8), bytes(16), bytes(6))
    assert found.v2 is not None
    assert found.v2.eids == ("PYSMC-TEST",)


@pytest.mark.parametrize(
    ("proposal", "field"),
    [
        (replace(V1, typev2=PathType.SMCR), "iparea_offset"),
        (replace(V1, typev1=PathType.NONE, ip_area=None), "iparea_offset"),
        (replace(V1, iparea_offset=41), "iparea_offset"),
        (replace(V1, iparea_offset=-1), "iparea_offset"),
        (replace(V1, ism_gid=1), "iparea_offset"),
        (replace(V1, vendor_options=b"12345"), "iparea_offset"),
        (replace(V2, iparea_offset=1), "iparea_offset"),
        (
            replace(V1, version=2, typev2=PathType.SMCR, iparea_offset=0),
            "iparea_offset",
        ),
        (replace(V1, ip_area=None), "ip_area"),
        (replace(V2, ip_area=IpArea()), "ip_area"),
        (replace(V1, v2=EXTENSION), "v2"),
        (replace(V2, v2=replace(EXTENSION, smcd=SmcdExtension("S"))), "v2.smcd"),
        (replace(V1, peer_id=bytes(7)), "peer_id"),
        (replace(V1, gid=bytes(17)), "gid"),
        (replace(V1, mac="020000000000"), "mac"),  # type: ignore[arg-type]
        (replace(V1, ip_area=IpArea(bytes(5))), "subnet"),
        (replace(V1, ip_area=IpArea(prefix_length=256)), "prefix_length"),
        (
            replace(V1, ip_area=IpArea(ipv6_prefixes=(PREFIX,) * 9)),
            "ip_area.ipv6_prefixes",
        ),
        (
            replace(V1, ip_area=IpArea(ipv6_prefixes=(Ipv6Prefix(b"", 1),))),
            "ip_area.ipv6_prefixes",
        ),
        (
            replace(V1, ip_area=IpArea(ipv6_prefixes=(Ipv6Prefix(bytes(16), 256),))),
            "ip_area.ipv6_prefixes",
        ),
        (replace(V1, version=16), "version"),
        (replace(V1, version=0), "version"),
    ],
)
def test_what_does_not_fit_is_not_built(proposal, field):
    with pytest.raises(EncodeError) as caught:
        proposal.build()
    assert caught.value.field == field


def test_it_can_be_logged():
    assert "ip=192.0.2.0/24" in str(V1)
    assert "ip=" not in str(V2)
    assert "eids='A'" in str(V2)
    both = replace(V1, ip_area=IpArea(b"\n\0\0\0", 8, (PREFIX,)))
    assert "ip=10.0.0.0/8,0000:" in str(both)
    assert "ip=0000:" in str(replace(V1, ip_area=IpArea(ipv6_prefixes=(PREFIX,))))
