"""Messages for `pysmc.testing.deliver`: what a peer might say, and its edges.

`genuine` gives every kind of message as an honest peer would make it for an endpoint in
its state, whether it is due there or not; `at_bounds` varies a message, field by field,
to the bounds of what the wire can carry.

Source: RFC 7609 appendix A; Linux net/smc for versions 2.0 and 2.1.
"""

from __future__ import annotations

import pickle
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from pysmc.testing.deliver import EndpointIn
from smcproto import cdc, clc, clc_v2, llc
from smcproto.constants import ConnectionStateFlags, DeleteLinkReason, ProducerFlags
from smcproto.errors import EncodeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pysmc.core.connection import Connection
    from pysmc.core.link import Link
    from pysmc.testing.deliver import Message

__all__ = ["at_bounds", "genuine"]

AnyMessage = TypeVar("AnyMessage", bound="Message")

BOUNDS = (0, 1, *((1 << width) - 1 for width in (2, 4, 8, 16, 24, 32, 48, 64)))
"""Whole numbers that are tried for every field; those that do not fit fall away."""


def genuine(endpoint: EndpointIn) -> dict[str, Message]:
    """Give every kind of message as an honest peer would make it.

    Args:
        endpoint: Whom it would be for. Nothing of it changes.

    Returns:
        Messages by name; only those that can arrive in this state.
    """
    messages: dict[str, Message] = dict(_clc())
    link = endpoint.link
    if link is not None:
        messages |= _llc(link)
        connection = endpoint.connection
        if connection is not None:
            messages |= _cdc(connection, endpoint.scene.peer_connection)
    return {
        name: message
        for name, message in messages.items()
        if endpoint.takes(type(message))
    }


@cache
def _clc() -> dict[str, clc.ClcMessage]:
    found: dict[str, Any] = {
        name: EndpointIn(state).awaited[0]
        for name, state in (
            ("Proposal", "server/await-proposal"),
            ("Accept, first contact", "client/await-accept"),
            ("Accept, reuse", "client/reuse/await-accept"),
            ("Confirm, first contact", "server/await-confirm"),
            ("Confirm, reuse", "server/reuse/await-confirm"),
        )
    }
    decline = clc.Decline(
        version=2, out_of_sync=False, peer_id=bytes(8), diagnosis=0x03030000
    )
    found["Decline"] = decline
    found["Decline, out of sync"] = replace(decline, out_of_sync=True)
    found["Decline, version 1"] = replace(decline, version=1)
    found["SMC-D Accept"] = clc.SmcdAccept(
        version=2,
        first_contact=False,
        gid=1,
        token=2,
        dmbe_index=1,
        dmbe_size_code=0,
        link_id=3,
        v2=clc_v2.SmcdAcceptExtension(chid=4, eid="PAIR", first_contact=None),
    )
    return found


def _llc(link: Link) -> dict[str, llc.LlcMessage]:
    messages: dict[str, llc.LlcMessage] = {}
    for response in (False, True):
        kind = "response" if response else "request"
        for message in _llc_of(link, response=response):
            messages[f"{message.TYPE.name}, {kind}"] = message
    delete = messages["DELETE_LINK, request"]
    assert isinstance(delete, llc.DeleteLink)
    messages["DELETE_LINK, request, another link"] = replace(
        delete, link_number=(link.number + 1) & 0xFF
    )
    messages["DELETE_LINK, request, whole group"] = replace(
        delete, link_number=0, whole_group=True
    )
    return messages


def _llc_of(link: Link, *, response: bool) -> Iterator[llc.LlcMessage]:
    """Give one message of every type, with the numbers of this link."""
    remote = link.remote or link.local
    port: dict[str, Any] = {"mac": remote.mac, "gid": remote.gid}
    head: dict[str, Any] = {"version": 2, "response": response}
    connections = list(link.group.connections.values())
    ours = next((each for c in connections for each in c.rmb.tokens.values()), None)
    theirs = next((c.remote_rkey for c in connections), 0)
    yield llc.ConfirmLink(
        **head,
        **port,
        qp_number=remote.qp_number,
        link_number=link.number or 1,
        link_user_id=7,
        max_links=1,
        max_connections=255,
    )
    yield llc.AddLink(
        **head,
        **port,
        qp_number=remote.qp_number + 1,
        link_number=(link.number + 1) & 0xFF,
        mtu_code=3,
        psn=1,
        rejected=response,
        client_target_gid=None if response else remote.gid,
    )
    yield llc.DeleteLink(
        **head, link_number=link.number, reason=DeleteLinkReason.LOST_PATH
    )
    yield llc.RequestAddLink(response=response)
    yield llc.ConfirmRkey(
        **head,
        rkey=ours.rkey if response and ours else 0x7777,
        virtual_address=0x7777 << 32,
    )
    yield llc.DeleteRkey(**head, rkeys=(theirs,))
    yield llc.TestLink(**head, user_data=bytes(range(16)))
    yield llc.AddLinkContinuation(version=1, response=response, link_number=link.number)
    yield llc.ConfirmRkeyContinuation(version=1, response=response)


_D = ConnectionStateFlags.SENDING_DONE
_C = ConnectionStateFlags.CLOSED
_A = ConnectionStateFlags.ABNORMAL_CLOSE


def _cdc(ours: Connection, theirs: Connection | None) -> dict[str, cdc.CdcMessage]:
    """Give what the peer may say next.

    Without a connection at its end, as during the handshake, it is the first update.
    """
    base = cdc.CdcMessage(
        sequence=1,
        alert_token=ours.alert_token,
        producer_wrap=0,
        producer_count=0,
        consumer_wrap=0,
        consumer_count=0,
    )
    if theirs is not None and theirs.group is not None:
        # What it says next, without saying it.
        update = pickle.loads(pickle.dumps(theirs)).take_update()
        base = cdc.CdcMessage.parse(cdc.pack(*update))
    wrap, count = divmod(base.producer_count + 1, ours.rmbe_bytes)
    further = replace(
        base, producer_count=count, producer_wrap=base.producer_wrap + wrap & 0xFFFF
    )
    return {
        "CDC": base,
        "CDC, one more byte": further,
        "CDC, done": replace(base, state_flags=_D),
        "CDC, closed": replace(base, state_flags=_D | _C),
        "CDC, aborted": replace(base, state_flags=_A),
        "CDC, blocked": replace(base, producer_flags=ProducerFlags.WRITER_BLOCKED),
        "CDC, wants an update": replace(
            base, producer_flags=ProducerFlags.CONSUMER_UPDATE_REQUESTED
        ),
        "CDC, failover": replace(
            base, sequence=0, producer_flags=ProducerFlags.FAILOVER_VALIDATION
        ),
        "CDC, another token": replace(base, alert_token=ours.alert_token ^ 1),
    }


def at_bounds(message: AnyMessage) -> Iterator[tuple[str, AnyMessage]]:
    """Vary a message: one field at a time, to each bound that the wire can carry.

    Args:
        message: What to begin with.

    Yields:
        (what was changed, the changed message). ``build`` refuses none of them.
    """
    for name, changed in _varied(message):
        try:
            changed.build()
        except EncodeError:
            continue
        yield name, changed


def _varied(record: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            for name, changed in _varied(value):
                yield (
                    f"{field.name}.{name}",
                    replace(record, **{field.name: changed}),
                )
        for name, changed in _varied_entry(value):
            yield f"{field.name}{name}", replace(record, **{field.name: changed})
        for bound in _bounds(value):
            if bound != value:
                text = f"{field.name}={bound!r}"
                yield text, replace(record, **{field.name: bound})


def _varied_entry(value: object) -> Iterator[tuple[str, Any]]:
    """Vary the last entry of a tuple, and each part of it where it is a record."""
    if not isinstance(value, tuple) or not value:
        return
    *others, last = value
    found: list[tuple[str, Any]] = []
    if is_dataclass(last):
        found = [(f".{name}", changed) for name, changed in _varied(last)]
    elif isinstance(last, tuple):
        parts = getattr(last, "_fields", range(len(last)))
        for number, (part, old) in enumerate(zip(parts, last, strict=True)):
            for bound in _bounds(old):
                entry = (*last[:number], bound, *last[number + 1 :])
                made = type(last)(*entry) if hasattr(last, "_make") else entry
                if bound != old:
                    found.append((f".{part}={bound!r}", made))
    else:
        found = [(f"={each!r}", each) for each in _bounds(last) if each != last]
    for name, changed in found:
        yield f"[{len(others)}]{name}", (*others, changed)


def _bounds(value: object) -> tuple[Any, ...]:
    """Give the values to try in place of this one."""
    match value:
        case bool():
            return (not value,)
        case ProducerFlags() | ConnectionStateFlags():
            kind = type(value)
            return (kind(0), *kind, ~kind(0))
        case Enum():
            return tuple(type(value))
        case int():
            return BOUNDS
        case bytes():
            return (bytes(len(value)), b"\xff" * len(value))
        case str():
            return ("A", "Z" * 32)
        case tuple() if value:
            return ((), value[:1], value[:1] * 2, value[:1] * 255)
    return ()
