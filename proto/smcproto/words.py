"""What every field of every message means, for people.

Decides one sentence for each message and each field, and how the values of a field
are shown. Does not know layouts; a test holds it against the dataclasses, so that no
field is without words.

Source: RFC 7609 appendix A and Linux net/smc, as in the modules of the messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from smcproto.constants import (
    AddLinkReject,
    DeleteLinkReason,
    Mtu,
    OsType,
    PathType,
    mtu_bytes,
    rmbe_bytes,
)
from smcproto.diagnosis import describe

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGES: Final = {
    "Proposal": "CLC, client to server: what the client can do",
    "Accept": "CLC, server to client: the link and where the server's buffer is",
    "Confirm": "CLC, client to server: where the client's buffer is",
    "SmcdAccept": "CLC, server to client: SMC-D, which this library does not speak",
    "SmcdConfirm": "CLC, client to server: SMC-D, which this library does not speak",
    "Decline": "CLC, either side: no SMC for this connection, it goes on as TCP",
    "ConfirmLink": "LLC on a new link: it carries messages",
    "AddLink": "LLC: a queue pair for one more link",
    "AddLinkContinuation": "LLC: remote keys for the link being added",
    "DeleteLink": "LLC: a link, or the whole group, goes",
    "RequestAddLink": "LLC, client to server: please add a link",
    "ConfirmRkey": "LLC: a region that the receiver may write to",
    "ConfirmRkeyContinuation": "LLC: keys of a region on further links",
    "DeleteRkey": "LLC: regions that must not be written to any more",
    "TestLink": "LLC: is the link alive?",
    "CdcMessage": "CDC: how far one connection has written, read and closed",
    "SmcOption": "TCP option on SYN and SYN-ACK: the sender speaks SMC-R",
}
"""Message class to what it is for."""

FIELDS: Final = {
    "alert_token": "names the connection to the receiver of CDC messages",
    "client_target_gid": "GID that the client should reach for the new link",
    "chid": "channel ID of the ISM device",
    "consumer_count": "next byte that the sender will read in its own element",
    "consumer_wrap": "how often the sender's reading has wrapped",
    "count": "keys asked about, more than are repeated",
    "diagnosis": "why the sender declines",
    "direct": "no IP gateway between the devices",
    "dmbe_index": "element of the direct memory buffer",
    "dmbe_size_code": "size of that element",
    "eid": "enterprise ID that both sides have",
    "eids": "enterprise IDs of the client, in its order of preference",
    "error_mask": "keys that were unknown, 0x80 the first",
    "extra": "further diagnosis codes",
    "feature_mask": "optional features",
    "first_contact": "a new link group begins",
    "gid": "GID of the sender's port",
    "gids": "GIDs of the sender's ports",
    "host_name": "name of the sender's host",
    "invalid_count": "how many keys were unknown",
    "iparea_offset": "bytes before the IP area, if unusual",
    "ipv6_prefixes": "IPv6 networks of the client",
    "ism_chid": "channel ID of the client's ISM device",
    "ism_gid": "GID of the client's ISM device",
    "length": "significant bits",
    "link_id": "sender's own number of the link",
    "link_number": "number of the link in its group",
    "link_user_id": "sender's own name of the link",
    "mac": "MAC of the sender's port",
    "max_connections": "most connections for each link group",
    "max_links": "most links for each link group",
    "mtu_code": "largest packet of the queue pair",
    "new_rkey": "key on the new link",
    "new_virtual_address": "address on the new link",
    "no_eyecatcher": "buffer elements begin with data if any bit is set",
    "orderly": "connections are moved or closed first",
    "os_type": "operating system of the sender",
    "other_count": "other links in all, continuation messages follow",
    "other_links": "keys of the region on other links",
    "out_of_sync": "the receiver's link group is stale and must go",
    "peer_id": "instance number and MAC that name the sender's host",
    "prefix": "IPv6 network",
    "prefix_length": "significant bits of the subnet",
    "producer_count": "next byte that the sender will write in the receiver's element",
    "producer_flags": "what the sender says about its writing",
    "producer_wrap": "how often the sender's writing has wrapped",
    "psn": "first packet sequence number of the sender",
    "qp_number": "queue pair of the sender",
    "reason": "why it goes",
    "reference_rkey": "key on the link that carries this message",
    "refused": "the answer is no",
    "reject_reason": "why the client refuses the link",
    "rejected": "the client refuses the link",
    "release": "release of SMC version 2: 0 is 2.0, 1 is 2.1",
    "remaining": "keys still to come, these included",
    "response": "the answer to a request",
    "retry": "try again when the configuration change is over",
    "rkey": "remote key of the sender's buffer",
    "rkeys": "remote keys",
    "rmbe_index": "element of the sender's buffer, counted from 1",
    "rmbe_size_code": "size of that element",
    "seid": "system EID, for SMC-D",
    "seid_offered": "the system EID may be used",
    "sequence": "number of this message",
    "state_flags": "how far the sender has closed",
    "subnet": "IPv4 network of the client",
    "token": "names the direct memory buffer",
    "typev1": "offered for version 1",
    "typev2": "offered for version 2",
    "user_data": "returned unchanged in the answer",
    "vendor_options": "options of the sender's vendor",
    "vendor_oui": "the sender's vendor",
    "version": "version of SMC",
    "virtual_address": "start of the sender's buffer",
    "whole_group": "all links of the group",
}
"""Field to what it says; the same name means the same in every message."""

HEXADECIMAL: Final = frozenset(
    {
        "alert_token", "error_mask", "extra", "feature_mask", "ism_chid", "ism_gid",
        "link_id", "link_user_id", "new_rkey", "new_virtual_address", "psn",
        "qp_number", "reference_rkey", "rkey", "rkeys", "token", "vendor_options",
        "virtual_address",
    }
)  # fmt: skip
"""Numbers that nobody reads in decimal."""

_PATHS: Final[dict[int, str]] = {
    PathType.SMCR: "SMC-R",
    PathType.SMCD: "SMC-D",
    PathType.NONE: "nothing",
    PathType.BOTH: "SMC-R and SMC-D",
}
_REASONS: Final[dict[int, str]] = {
    DeleteLinkReason.OK: "done",
    DeleteLinkReason.LOST_PATH: "the path was lost",
    DeleteLinkReason.OPERATOR: "an operator wants it",
    DeleteLinkReason.PROGRAM: "the program ended, or the group was idle",
    DeleteLinkReason.PROTOCOL_VIOLATION: "the peer broke the protocol",
    DeleteLinkReason.ASYMMETRIC_LINK_NOT_NEEDED: "the asymmetric link is not needed",
    DeleteLinkReason.UNKNOWN_LINK: "there is no such link",
    DeleteLinkReason.UNKNOWN_GROUP: "there is no such link group",
}
_REJECTS: Final[dict[int, str]] = {
    AddLinkReject.NO_ALTERNATE_PATH: "there is no other path",
    AddLinkReject.INVALID_MTU: "the MTU code is invalid",
}
_SYSTEMS: Final[dict[int, str]] = {
    OsType.ZOS: "z/OS",
    OsType.LINUX: "Linux",
    OsType.AIX: "AIX",
}


def _size(code: int) -> str:
    """Say a size code in KiB."""
    return f"{rmbe_bytes(code) // 1024} KiB"


def _mtu(code: int) -> str:
    """Say an MTU code in bytes."""
    known = Mtu.BYTES_256 <= code <= Mtu.BYTES_4096
    return f"{mtu_bytes(code)} bytes" if known else "reserved"


def _diagnosis(code: int) -> str:
    """Say meaning and advice of a Decline."""
    known = describe(code)
    return f"{known.meaning} {known.advice}"


MEANINGS: Final[dict[str, Callable[[int], str]]] = {
    "diagnosis": _diagnosis,
    "dmbe_size_code": _size,
    "mtu_code": _mtu,
    "os_type": lambda code: _SYSTEMS.get(code, "unknown"),
    "reason": lambda code: _REASONS.get(code, "unknown"),
    "reject_reason": lambda code: _REJECTS.get(code, "none given"),
    "rmbe_size_code": _size,
    "typev1": lambda code: _PATHS[code],
    "typev2": lambda code: _PATHS[code],
}
"""Field to what one of its values means."""
