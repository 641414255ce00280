"""LLC messages: how two ends look after links and remote keys.

The door to all LLC messages: ``parse`` reads any, of version 1 and 2; ``version``
and ``response`` are attributes of each. Decides nothing but which class a type
number stands for.

Source: RFC 7609 A.3; version 2: Linux net/smc/smc_llc.h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias

from smcproto.llc_header import is_ignorable, is_question, open_frame
from smcproto.llc_links import (
    AddLink,
    AddLinkContinuation,
    ConfirmLink,
    DeleteLink,
    RequestAddLink,
    RkeyPair,
    TestLink,
)
from smcproto.llc_rkeys import (
    ConfirmRkey,
    ConfirmRkeyContinuation,
    DeleteRkey,
    OtherLink,
)

if TYPE_CHECKING:
    from smcproto.constants import LlcType
    from smcproto.layout import Buffer

__all__ = [
    "AddLink",
    "AddLinkContinuation",
    "ConfirmLink",
    "ConfirmRkey",
    "ConfirmRkeyContinuation",
    "DeleteLink",
    "DeleteRkey",
    "LlcMessage",
    "OtherLink",
    "RequestAddLink",
    "RkeyPair",
    "TestLink",
    "is_ignorable",
    "is_question",
    "parse",
]

LlcMessage: TypeAlias = (
    ConfirmLink
    | AddLink
    | AddLinkContinuation
    | DeleteLink
    | RequestAddLink
    | ConfirmRkey
    | ConfirmRkeyContinuation
    | TestLink
    | DeleteRkey
)
"""Any LLC message."""

_CLASSES: Final[dict[LlcType, type[LlcMessage]]] = {
    kind.TYPE: kind
    for kind in (
        ConfirmLink,
        AddLink,
        AddLinkContinuation,
        DeleteLink,
        RequestAddLink,
        ConfirmRkey,
        ConfirmRkeyContinuation,
        TestLink,
        DeleteRkey,
    )
}


def parse(data: Buffer) -> LlcMessage:
    """Read any LLC message, of either version.

    Args:
        data: Exactly the bytes that one completion delivered.

    Raises:
        DecodeError: It is none. With ``field == "type"`` the type is unknown, and
            ``is_ignorable`` says whether it may be passed over.

    Reference: RFC 7609 A.3.
    """
    kind, version, message = open_frame(data)
    return _CLASSES[kind].read(message, version)
