"""Hypothesis strategies for what travels between two ends of SMC-R.

For property tests of codecs, cores, fabrics and tools: every strategy draws values that
the wire can carry, so that ``build`` never refuses one. What a *legal* exchange is they
do not know: a drawn Confirm fits no Accept. Needs ``hypothesis`` to be installed.

Source: RFC 7609 appendix A; Linux net/smc for versions 2.0 and 2.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from hypothesis import strategies as st

from pysmc.core.cursor import Cursor
from smcproto import clc, llc
from smcproto.constants import (
    ADD_LINK_CONTINUATION_RKEYS_MAX,
    CONFIRM_RKEY_CONTINUATION_LINKS_MAX,
    CONFIRM_RKEY_LINKS_MAX,
    DELETE_RKEY_V1_MAX,
    IPV6_PREFIXES_MAX,
    RMBE_BYTES_MIN,
    UEIDS_MAX,
    OsType,
    PathType,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from pysmc.core.connection import Update

__all__ = [
    "accepts",
    "clc_messages",
    "confirms",
    "cursors",
    "declines",
    "eids",
    "llc_messages",
    "proposals",
    "rmbe_sizes",
    "updates",
]

_Contact = TypeVar("_Contact", clc.Accept, clc.Confirm)

PRODUCER_FLAGS = (0x80, 0x40, 0x20, 0x10, 0x08)
STATE_FLAGS = (0x80, 0x40, 0x20)
ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def _bits(width: int) -> SearchStrategy[int]:
    """Draw a number of so many bits, its edges more often than chance would."""
    most = (1 << width) - 1
    return st.integers(0, most) | st.sampled_from([0, 1, most])


def _raw(size: int) -> SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


# The data path


def rmbe_sizes(most: int = 512 << 20) -> SearchStrategy[int]:
    """Draw sizes of an RMB element that CLC can name.

    Args:
        most: Largest size in bytes, at least 16384.
    """
    return st.sampled_from(
        [RMBE_BYTES_MIN << code for code in range(16) if RMBE_BYTES_MIN << code <= most]
    )


def cursors(size: int = RMBE_BYTES_MIN, base: int = 0) -> SearchStrategy[Cursor]:
    """Draw cursors inside an element, its edges more often than chance would.

    Args:
        size: Bytes of the element.
        base: Offset of its first data byte.
    """
    edges = sorted({base, min(base + 1, size - 1), size - 1})
    count = st.integers(base, size - 1) | st.sampled_from(edges)
    return st.builds(Cursor, wrap=_bits(16), count=count)


def updates(
    token: int | None = None, size: int = RMBE_BYTES_MIN
) -> SearchStrategy[Update]:
    """Draw updates as `pysmc.core.connection.Connection.receive_update` takes them.

    Args:
        token: The alert token; None draws any.
        size: Bytes of the element that the cursors lie in; half of them lie anywhere.
    """
    inside = cursors(size).map(lambda cursor: cursor.packed)
    cursor = inside | _bits(48)
    producer_flags = st.sets(st.sampled_from(PRODUCER_FLAGS)).map(sum)
    state_flags = st.sets(st.sampled_from(STATE_FLAGS)).map(sum)
    return st.tuples(
        _bits(16),
        _bits(32) if token is None else st.just(token),
        cursor,
        cursor,
        st.builds(lambda high, low: high << 8 | low, producer_flags, state_flags),
    )


# CLC


def eids() -> SearchStrategy[str]:
    """Draw user-defined EIDs: 1 to 32 of A-Z, 0-9, dot and hyphen."""
    rest = st.text(ALPHANUMERIC + ".-", max_size=31)
    return st.builds(
        lambda first, more: first + more, st.sampled_from(ALPHANUMERIC), rest
    ).filter(lambda eid: ".." not in eid)


def _host_names() -> SearchStrategy[str]:
    return st.text("abcdefghijklmnopqrstuvwxyz0123456789-", max_size=32)


def _os_types() -> SearchStrategy[int]:
    return st.sampled_from(OsType)


def _first_contacts() -> SearchStrategy[clc.FirstContactExtension]:
    return st.builds(
        clc.FirstContactExtension,
        direct=st.booleans(),
        os_type=_os_types(),
        release=_bits(4),
        host_name=_host_names(),
        max_connections=_bits(8),
        max_links=_bits(8),
        feature_mask=_bits(16),
        vendor_options=_bits(32),
    )


def proposals() -> SearchStrategy[clc.Proposal]:
    """Draw Proposals for SMC-R: version 1, version 2, or both."""
    prefixes = st.builds(clc.Ipv6Prefix, _raw(16), st.integers(0, 128))
    areas = st.builds(
        clc.IpArea,
        subnet=_raw(4),
        prefix_length=st.integers(0, 32),
        ipv6_prefixes=st.lists(prefixes, max_size=IPV6_PREFIXES_MAX).map(tuple),
    )
    extensions = st.builds(
        clc.ProposalExtension,
        eids=st.lists(eids(), max_size=UEIDS_MAX).map(tuple),
        release=_bits(4),
        gid=_raw(16),
        max_connections=_bits(8),
        max_links=_bits(8),
        feature_mask=_bits(16),
    )
    only_1, only_2, both = (
        st.builds(
            clc.Proposal,
            version=st.just(version),
            peer_id=_raw(8),
            gid=_raw(16),
            mac=_raw(6),
            typev1=st.just(PathType.SMCR if has_1 else PathType.NONE),
            typev2=st.just(PathType.SMCR if version > 1 else PathType.NONE),
            ip_area=areas if has_1 else st.none(),
            v2=extensions if version > 1 else st.none(),
        )
        for version, has_1 in ((1, True), (2, False), (2, True))
    )
    return only_1 | only_2 | both


def accepts() -> SearchStrategy[clc.Accept]:
    """Draw Accepts of versions 1 and 2, first contact or not."""
    first, reuse = (
        st.builds(clc.AcceptExtension, eid=eids(), first_contact=contact)
        for contact in (_first_contacts(), st.none())
    )
    return st.one_of(
        _contacts(clc.Accept, 1, st.booleans(), st.none()),
        _contacts(clc.Accept, 2, st.just(value=True), first),
        _contacts(clc.Accept, 2, st.just(value=False), reuse),
    )


def confirms() -> SearchStrategy[clc.Confirm]:
    """Draw Confirms of versions 1 and 2, first contact or not."""
    first = st.builds(
        clc.ConfirmExtension,
        eid=eids(),
        first_contact=_first_contacts(),
        gids=st.lists(_raw(16), max_size=4).map(tuple),
    )
    reuse = st.builds(clc.ConfirmExtension, eid=eids())
    return st.one_of(
        _contacts(clc.Confirm, 1, st.booleans(), st.none()),
        _contacts(clc.Confirm, 2, st.booleans(), first),
        _contacts(clc.Confirm, 2, st.just(value=False), reuse),
    )


def _contacts(
    kind: type[_Contact],
    version: int,
    first_contact: SearchStrategy[bool],
    v2: SearchStrategy[object],
) -> SearchStrategy[_Contact]:
    return st.builds(
        kind,
        version=st.just(version),
        first_contact=first_contact,
        peer_id=_raw(8),
        gid=_raw(16),
        mac=_raw(6),
        qp_number=_bits(24),
        rkey=_bits(32),
        rmbe_index=st.integers(1, 255),
        alert_token=_bits(32),
        rmbe_size_code=_bits(4),
        mtu_code=st.integers(1, 5),
        virtual_address=_bits(64),
        psn=_bits(24),
        v2=v2,
    )


def declines() -> SearchStrategy[clc.Decline]:
    """Draw Declines of versions 1 and 2."""
    version_1 = st.builds(
        clc.Decline,
        version=st.just(1),
        out_of_sync=st.booleans(),
        peer_id=_raw(8),
        diagnosis=_bits(32),
    )
    version_2 = st.builds(
        clc.Decline,
        version=st.just(2),
        out_of_sync=st.booleans(),
        peer_id=_raw(8),
        diagnosis=_bits(32),
        os_type=_os_types(),
    )
    return version_1 | version_2


def clc_messages() -> SearchStrategy[clc.ClcMessage]:
    """Draw any CLC message of SMC-R."""
    return st.one_of(proposals(), accepts(), confirms(), declines())


# LLC


def llc_messages(version: int = 2) -> SearchStrategy[llc.LlcMessage]:
    """Draw any LLC message of one version, requests and responses.

    Args:
        version: 1 or 2.
    """
    head = {"version": st.just(version), "response": st.booleans()}
    port = {"mac": _raw(6), "gid": _raw(16), "qp_number": _bits(24)}
    both = [
        st.builds(
            llc.ConfirmLink,
            **head,
            **port,
            link_number=_bits(8),
            link_user_id=_bits(32),
            max_links=_bits(8),
            max_connections=_bits(8) if version > 1 else st.just(0),
            no_eyecatcher=_bits(2),
        ),
        st.builds(
            llc.AddLink,
            **head,
            **port,
            # A request of zeros is Linux's own event.
            link_number=st.integers(1, 255),
            mtu_code=st.integers(1, 5),
            psn=_bits(24),
            rejected=st.booleans(),
        ),
        st.builds(
            llc.DeleteLink,
            **head,
            link_number=_bits(8),
            reason=_bits(32),
            whole_group=st.booleans(),
            orderly=st.booleans(),
        ),
        st.builds(
            llc.ConfirmRkey,
            **head,
            refused=st.booleans(),
            retry=st.booleans(),
            rkey=_bits(32),
            virtual_address=_bits(64),
            other_links=_links(CONFIRM_RKEY_LINKS_MAX),
        ),
        st.builds(llc.TestLink, **head, user_data=_raw(16)),
        st.builds(
            llc.DeleteRkey,
            **head,
            rkeys=st.lists(_bits(32), max_size=DELETE_RKEY_V1_MAX).map(tuple),
            refused=st.booleans(),
        ),
    ]
    return st.one_of(*both, *(_only_version_1() if version == 1 else _only_version_2()))


def _links(most: int) -> SearchStrategy[tuple[llc.OtherLink, ...]]:
    link = st.builds(llc.OtherLink, _bits(8), _bits(32), _bits(64))
    return st.lists(link, max_size=most).map(tuple)


def _only_version_1() -> list[SearchStrategy[llc.LlcMessage]]:
    pair = st.builds(llc.RkeyPair, _bits(32), _bits(32), _bits(64))
    pairs = st.lists(pair, max_size=ADD_LINK_CONTINUATION_RKEYS_MAX).map(tuple)
    return [
        st.builds(
            llc.AddLinkContinuation,
            version=st.just(1),
            response=st.booleans(),
            link_number=_bits(8),
            rkeys=pairs,
        ),
        st.builds(
            llc.ConfirmRkeyContinuation,
            version=st.just(1),
            response=st.booleans(),
            other_links=_links(CONFIRM_RKEY_CONTINUATION_LINKS_MAX),
        ),
    ]


def _only_version_2() -> list[SearchStrategy[llc.LlcMessage]]:
    requests = st.builds(
        llc.RequestAddLink,
        version=st.just(2),
        response=st.just(value=False),
        gids=st.lists(_raw(16), max_size=4).map(tuple),
    )
    answers = st.just(llc.RequestAddLink(version=2, response=True))
    return [requests, answers]
