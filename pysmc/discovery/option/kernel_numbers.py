"""What Linux calls its numbers and the fields of what BPF programs are given.

Decides nothing.

Source: include/uapi/linux/bpf.h, tcp.h and in.h.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final

from pysmc.discovery.option.assembler import Field

__all__ = [
    "ARGUMENT",
    "CALLBACK_FLAGS",
    "CREATE",
    "FAMILY",
    "FROM_SAVED_SYN",
    "LENGTH",
    "LOCAL_IP4",
    "LOCAL_IP6",
    "LOCAL_PORT",
    "NAME",
    "NEW",
    "OP",
    "PROTOCOL",
    "RESULT",
    "SOCKET",
    "SOCKET_STATE",
    "SOCKOPT_LEVEL",
    "SOCKOPT_SOCKET",
    "SYN_COOKIE",
    "TCP_FLAGS",
    "VALUE",
    "VALUE_END",
    "Callback",
    "Flag",
    "Helper",
    "Op",
    "Tcp",
]


class Tcp(IntEnum):
    """Numbers of TCP in the kernel."""

    PROTOCOL = 6
    """IPPROTO_TCP, also a level of socket options."""
    CLOSE = 7
    """State of a socket that neither listens nor connects."""
    SAVE_SYN = 27
    """Socket option of a listener."""


class Flag(IntFlag):
    """Flags of a TCP header."""

    SYN = 0x02
    ACK = 0x10


class Callback(IntFlag):
    """What a program may ask to be called for."""

    WRITE_HEADER = 1 << 6
    """The options of every segment."""


class Helper(IntEnum):
    """Functions of the kernel that a program may call."""

    MAP_LOOKUP_ELEM = 1
    MAP_UPDATE_ELEM = 2
    KTIME_GET_NS = 5
    SETSOCKOPT = 49
    SOCK_OPS_CB_FLAGS_SET = 59
    SK_STORAGE_GET = 107
    GET_NETNS_COOKIE = 122
    LOAD_HDR_OPT = 142
    STORE_HDR_OPT = 143
    RESERVE_HDR_OPT = 144


class Op(IntEnum):
    """Why the sock_ops program is called."""

    CONNECT = 3
    ACTIVE_ESTABLISHED = 4
    PASSIVE_ESTABLISHED = 5
    LISTEN = 11
    HEADER_LENGTH = 14
    WRITE_HEADER = 15


SYN_COOKIE: Final = 2
"""Argument of the header callbacks: the SYN-ACK is a SYN cookie."""
FROM_SAVED_SYN: Final = 1
"""load_hdr_opt: look into the SYN that the kernel kept."""
NEW: Final = 1
"""map_update_elem: leave an entry that is there as it is."""
CREATE: Final = 1
"""sk_storage_get: make an entry where there is none."""

# struct bpf_sock_ops
OP = Field("op", 0, 4)
ARGUMENT = Field("args[0]", 4, 4)
FAMILY = Field("family", 20, 4)
LOCAL_IP4 = Field("local_ip4", 28, 4)
LOCAL_IP6 = [Field(f"local_ip6[{n}]", 48 + 4 * n, 4) for n in range(4)]
LOCAL_PORT = Field("local_port", 68, 4)
CALLBACK_FLAGS = Field("bpf_sock_ops_cb_flags", 84, 4)
SOCKET = Field("sk", 184, 8)
TCP_FLAGS = Field("skb_tcp_flags", 212, 4)
# struct bpf_sockopt
SOCKOPT_SOCKET = Field("sk", 0, 8)
VALUE = Field("optval", 8, 8)
VALUE_END = Field("optval_end", 16, 8)
SOCKOPT_LEVEL = Field("level", 24, 4)
NAME = Field("optname", 28, 4)
LENGTH = Field("optlen", 32, 4)
RESULT = Field("retval", 36, 4)
# struct bpf_sock
PROTOCOL = Field("protocol", 12, 4)
SOCKET_STATE = Field("state", 72, 4)
