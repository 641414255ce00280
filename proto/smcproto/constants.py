"""Code points, sizes and limits of SMC-R, each with its source.

Decides which numbers stand for what on the wire. Knows nothing of layouts (the
message modules have them) and nothing of behaviour.

Source: RFC 7609 appendix A for version 1; the Linux kernel (net/smc/smc_clc.h,
smc_llc.h, smc_cdc.h, smc_core.h) for versions 2.0 and 2.1 and for everything
that the RFC leaves open.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

EYECATCHER_SMCR: Final = b"\xe2\xd4\xc3\xd9"
"""``SMCR`` in EBCDIC; first and last four bytes of a CLC message. RFC 7609 A.2.2."""

EYECATCHER_SMCD: Final = b"\xe2\xd4\xc3\xc4"
"""``SMCD`` in EBCDIC; in Accept and Confirm of SMC-D. Kernel: smc_clc.h."""


class ClcType(IntEnum):
    """CLC message types, byte 4. RFC 7609 A.2.2 to A.2.5."""

    PROPOSAL = 1
    ACCEPT = 2
    CONFIRM = 3
    DECLINE = 4


class PathType(IntEnum):
    """What a CLC message offers or chooses for one version, 2 bits.

    Kernel: smc_clc.h, ``SMC_TYPE_*``. The RFC knows SMC-R only.
    """

    SMCR = 0
    SMCD = 1
    NONE = 2
    BOTH = 3

    @property
    def offers_smcr(self) -> bool:
        """Whether SMC-R is among what is offered."""
        return self in (PathType.SMCR, PathType.BOTH)

    @property
    def offers_smcd(self) -> bool:
        """Whether SMC-D is among what is offered."""
        return self in (PathType.SMCD, PathType.BOTH)


class LlcType(IntEnum):
    """LLC message types of version 1, byte 0. RFC 7609 A.3.1 to A.3.8.

    In a version 2 group the same message has ``LLC_V2_FLAG`` added. REQUEST ADD
    LINK exists in version 2 only.
    """

    CONFIRM_LINK = 0x01
    ADD_LINK = 0x02
    ADD_LINK_CONTINUATION = 0x03
    DELETE_LINK = 0x04
    REQUEST_ADD_LINK = 0x05
    CONFIRM_RKEY = 0x06
    TEST_LINK = 0x07
    CONFIRM_RKEY_CONTINUATION = 0x08
    DELETE_RKEY = 0x09


LLC_V2_FLAG: Final = 0x20
"""Added to an ``LlcType`` in version 2. Kernel: smc_llc.h, ``SMC_LLC_*_V2``."""

CDC_TYPE: Final = 0xFE
"""Byte 0 of a CDC message in every version. RFC 7609 A.4."""


class AddLinkReject(IntEnum):
    """Why a client refuses ADD LINK (version 1 only), 4 bits. RFC 7609 A.3.2."""

    NO_ALTERNATE_PATH = 1
    INVALID_MTU = 2


class DeleteLinkReason(IntEnum):
    """Why a link or a whole group goes, 32 bits. RFC 7609 A.3.4."""

    OK = 0
    LOST_PATH = 0x00010000
    OPERATOR = 0x00020000
    PROGRAM = 0x00030000
    PROTOCOL_VIOLATION = 0x00040000
    ASYMMETRIC_LINK_NOT_NEEDED = 0x00050000
    UNKNOWN_LINK = 0x00100000
    UNKNOWN_GROUP = 0x00200000


class ProducerFlags(IntFlag):
    """CDC byte 24: what the sender says as a producer. RFC 7609 A.4."""

    WRITER_BLOCKED = 0x80
    URGENT_PENDING = 0x40
    URGENT_PRESENT = 0x20
    CONSUMER_UPDATE_REQUESTED = 0x10
    FAILOVER_VALIDATION = 0x08


class ConnectionStateFlags(IntFlag):
    """CDC byte 25: how far the sender has closed. RFC 7609 A.4."""

    SENDING_DONE = 0x80
    CLOSED = 0x40
    ABNORMAL_CLOSE = 0x20


class OsType(IntEnum):
    """The sender's operating system, 4 bits. Kernel: smc_clc.h, ``SMC_CLC_OS_*``."""

    UNKNOWN = 0
    ZOS = 1
    LINUX = 2
    AIX = 3


class Mtu(IntEnum):
    """Queue pair MTU codes (InfiniBand's), 4 bits. RFC 7609 A.2.3."""

    BYTES_256 = 1
    BYTES_512 = 2
    BYTES_1024 = 3
    BYTES_2048 = 4
    BYTES_4096 = 5


# Sizes of fields, in bytes. RFC 7609 A.2.
PEER_ID_BYTES: Final = 8
GID_BYTES: Final = 16
MAC_BYTES: Final = 6
EID_BYTES: Final = 32  # Kernel: SMC_MAX_EID_LEN.
HOST_NAME_BYTES: Final = 32  # Kernel: SMC_MAX_HOSTNAME_LEN.
TEST_LINK_DATA_BYTES: Final = 16  # RFC 7609 A.3.8.

# Sizes of CLC messages, in bytes, the trailer included.
CLC_HEADER_BYTES: Final = 8
CLC_TRAILER_BYTES: Final = 4
PROPOSAL_MIN_BYTES: Final = 52  # RFC 7609 A.2.2.
PROPOSAL_MAX_BYTES: Final = 652  # Every optional part at its largest.
CLC_MAX_BYTES: Final = 1024  # Ours: more than any Accept or Confirm in use.
ACCEPT_V1_BYTES: Final = 68  # RFC 7609 A.2.3; a Confirm has the same size.
ACCEPT_V2_BYTES: Final = 108  # Without first contact. Kernel: smc_clc.h.
ACCEPT_V2_FIRST_CONTACT_BYTES: Final = 160
CONFIRM_V2_FIRST_CONTACT_BYTES: Final = 164  # And 16 for each GID.
SMCD_ACCEPT_V1_BYTES: Final = 48
SMCD_ACCEPT_V2_BYTES: Final = 78
SMCD_ACCEPT_V2_RELEASE_0_BYTES: Final = 114
SMCD_ACCEPT_V2_RELEASE_1_BYTES: Final = 130
DECLINE_V1_BYTES: Final = 28  # RFC 7609 A.2.5.
DECLINE_V2_BYTES: Final = 44

# Limits of CLC lists.
IPV6_PREFIXES_MAX: Final = 8  # RFC 7609 A.2.2.
UEIDS_MAX: Final = 8  # Kernel: SMC_CLC_MAX_UEID.
ISM_GIDS_MAX: Final = 8  # Kernel: SMCD_CLC_MAX_V2_GID_ENTRIES.

# Sizes and limits of LLC and CDC messages.
LLC_V1_BYTES: Final = 44  # RFC 7609 A.3.
LLC_V2_MAX_BYTES: Final = 8192  # Kernel: SMC_WR_BUF_V2_SIZE.
CDC_BYTES: Final = 44  # RFC 7609 A.4.
ADD_LINK_CONTINUATION_RKEYS_MAX: Final = 2  # RFC 7609 A.3.3, a message.
ADD_LINK_V2_RKEYS_MAX: Final = 255  # Kernel: SMC_RMBS_PER_LGR_MAX.
CONFIRM_RKEY_LINKS_MAX: Final = 2  # RFC 7609 A.3.5, a message.
CONFIRM_RKEY_CONTINUATION_LINKS_MAX: Final = 3  # RFC 7609 A.3.6, a message.
DELETE_RKEY_V1_MAX: Final = 8  # RFC 7609 A.3.7.
DELETE_RKEY_V2_MAX: Final = 255  # Kernel: SMC_LLC_RKEYS_PER_MSG_V2.
LINKS_PER_GROUP_MAX: Final = 8  # RFC 7609 A.3.5; Linux has three slots.

RMBE_BYTES_MIN: Final = 16 * 1024
"""The smallest RMB element, size code 0. RFC 7609 A.2.3."""

RMBE_SIZE_CODE_MAX: Final = 15
"""The largest 4-bit size code, 512 MiB; the RFC stops at 5, Linux does not."""


def rmbe_bytes(code: int) -> int:
    """Give the size of an RMB element for its compressed form.

    Args:
        code: RMBE size code, 0 to 15.

    Returns:
        Bytes, a power of two from 16 KiB to 512 MiB.

    Raises:
        ValueError: The code does not fit into four bits.

    Reference: RFC 7609 A.2.3, "Bsize".
    """
    if not 0 <= code <= RMBE_SIZE_CODE_MAX:
        msg = f"RMBE size code {code} is outside 0 to {RMBE_SIZE_CODE_MAX}"
        raise ValueError(msg)
    return RMBE_BYTES_MIN << code


def rmbe_size_code(size_bytes: int) -> int:
    """Give the compressed form of an RMB element's size.

    Args:
        size_bytes: A power of two from 16 KiB to 512 MiB.

    Returns:
        RMBE size code, 0 to 15.

    Raises:
        ValueError: The size has no code; the message names the sizes that have.

    Reference: RFC 7609 A.2.3, "Bsize".
    """
    code = size_bytes.bit_length() - RMBE_BYTES_MIN.bit_length()
    if not 0 <= code <= RMBE_SIZE_CODE_MAX or RMBE_BYTES_MIN << code != size_bytes:
        msg = (
            f"{size_bytes} bytes have no RMBE size code: use a power of two from "
            f"{RMBE_BYTES_MIN} to {RMBE_BYTES_MIN << RMBE_SIZE_CODE_MAX}"
        )
        raise ValueError(msg)
    return code


def mtu_bytes(code: int) -> int:
    """Give the MTU in bytes for its code.

    Args:
        code: MTU code, 1 to 5.

    Returns:
        Bytes, 256 to 4096.

    Raises:
        ValueError: The code is reserved.

    Reference: RFC 7609 A.2.3, "MTU".
    """
    if not Mtu.BYTES_256 <= code <= Mtu.BYTES_4096:
        msg = f"MTU code {code} is reserved: 1 to 5 are defined"
        raise ValueError(msg)
    return 128 << code
