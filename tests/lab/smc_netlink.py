"""What the kernel's own SMC is told and tells over netlink.

PNETIDs and UEIDs are set by generic netlink; `smc_diag` lists the sockets of AF_SMC and
of IPPROTO_SMC, with the way that each has taken: SMC-R, or TCP and why.

Source: kernel `include/uapi/linux/smc.h`, `smc_diag.h`, `genetlink.h`, `netlink.h`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Socket",
    "add_pnetid",
    "add_ueid",
    "flush_pnetids",
    "flush_ueids",
    "smc_diag",
]

GENERIC, SOCK_DIAG = 16, 4
HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
GENERIC_HEADER = struct.Struct("=BBH")  # command, version, reserved
ATTRIBUTE = struct.Struct("=HH")
REQUEST, ACK, DUMP = 0x1, 0x4, 0x300
ERROR, DONE = 2, 3
CONTROL, GET_FAMILY, FAMILY_ID, FAMILY_NAME = 16, 3, 1, 2
PNETID_ADD, PNETID_FLUSH = 2, 4
UEID_ADD, UEID_FLUSH = 10, 12
UEID_BYTES = 32
SOCK_DIAG_BY_FAMILY = 20
AF_SMC = 43
SOCKET_ID_BYTES = 48
CONNECTION, GROUP, FALLBACK = 1, 2, 5
MODES = {0: "smcr", 1: "tcp", 2: "smcd"}
MESSAGE_BYTES = 64
"""Of an answer before its attributes."""
LINK_BYTES = 146
"""Of `struct smc_diag_linkinfo`; the role of the group follows it."""


class Socket(NamedTuple):
    """One SMC socket, as the kernel sees it."""

    state: int
    """1 ACTIVE, 2 INIT, 7 CLOSED, 10 LISTEN, 20... closing; see wire states."""
    mode: str
    """"smcr", "smcd", or "tcp" after a fallback."""
    reason: int
    """Why it fell back; 0 if it did not."""
    peer_diagnosis: int
    """What the peer's Decline said; 0 without one."""
    port: int
    """Its own; the kernel tells addresses of AF_SMC alone, not of IPPROTO_SMC."""
    peer_port: int
    device: str
    """The RDMA device of its link; empty without one."""
    link: int
    """Number of the link in its group."""
    role: str
    """"client" or "server" of its group; empty without one."""
    token: int
    """Its alert token."""
    rmbe_bytes: int
    peer_rmbe_bytes: int


def add_pnetid(name: str, network_device: str, rdma_device: str = "") -> None:
    """Say that a network device is on a network, and an RDMA device with it."""
    bodies = [_text(1, name) + _text(2, network_device)]
    if rdma_device:
        bodies.append(_text(1, name) + _text(3, rdma_device) + _attribute(4, b"\x01"))
    for body in bodies:
        _tell("SMC_PNETID", PNETID_ADD, body, errno.EEXIST)


def flush_pnetids() -> None:
    """Forget every PNETID."""
    _tell("SMC_PNETID", PNETID_FLUSH, b"", errno.ENOENT)


def add_ueid(name: str) -> None:
    """Configure a UEID; at most four."""
    text = name.ljust(UEID_BYTES)
    _tell("SMC_GEN_NETLINK", UEID_ADD, _text(1, text), errno.EEXIST)


def flush_ueids() -> None:
    """Forget every UEID."""
    _tell("SMC_GEN_NETLINK", UEID_FLUSH, b"", errno.ENOENT)


def smc_diag() -> list[Socket]:
    """List the SMC sockets of this network namespace, listening ones included."""
    wanted = sum(1 << kind - 1 for kind in (CONNECTION, GROUP, FALLBACK))
    body = struct.pack("=B2xB", AF_SMC, wanted) + bytes(SOCKET_ID_BYTES)
    return [
        _socket(answer)
        for kind, answer in _ask(SOCK_DIAG, SOCK_DIAG_BY_FAMILY, DUMP, body)
        if kind == SOCK_DIAG_BY_FAMILY
    ]


def _socket(answer: bytes) -> Socket:
    state, mode = answer[1], answer[2]
    ports = struct.unpack_from("!HH", answer, 4)
    attributes = dict(_attributes(answer[MESSAGE_BYTES:]))
    reason, diagnosis = struct.unpack("=II", attributes.get(FALLBACK, bytes(8)))
    token, _, ours, theirs = struct.unpack_from(
        "=4I", attributes.get(CONNECTION, bytes(16))
    )
    group = attributes.get(GROUP)
    assert group is None or len(group) == LINK_BYTES + 1, group
    return Socket(
        state=state,
        mode=MODES[mode],
        reason=reason,
        peer_diagnosis=diagnosis,
        port=ports[0],
        peer_port=ports[1],
        device="" if group is None else group[1:65].rstrip(b"\0").decode(),
        link=0 if group is None else group[0],
        role="" if group is None else ("client", "server")[group[LINK_BYTES]],
        token=token,
        rmbe_bytes=ours,
        peer_rmbe_bytes=theirs,
    )


# Netlink


def _tell(family: str, command: int, body: bytes, *harmless: int) -> None:
    """Give a command of a generic netlink family; an error is raised."""
    number = _family(family)
    head = GENERIC_HEADER.pack(command, 1, 0)
    try:
        for _ in _ask(GENERIC, number, ACK, head + body):
            pass
    except OSError as error:
        if error.errno not in harmless:
            raise


def _family(name: str) -> int:
    head = GENERIC_HEADER.pack(GET_FAMILY, 1, 0) + _text(FAMILY_NAME, name)
    for kind, answer in _ask(GENERIC, CONTROL, ACK, head):
        if kind == CONTROL:
            found = dict(_attributes(answer[GENERIC_HEADER.size :]))
            return int.from_bytes(found[FAMILY_ID], "little")
    message = f"no generic netlink family {name}"
    raise AssertionError(message)


def _ask(
    protocol: int, kind: int, flags: int, body: bytes
) -> Iterator[tuple[int, bytes]]:
    """Ask, and give type and body of each message of the answer."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as asked:
        asked.bind((0, 0))
        asked.settimeout(10)
        length = HEADER.size + len(body)
        asked.send(HEADER.pack(length, kind, flags | REQUEST, 1, 0) + body)
        while True:
            data, place = asked.recv(1 << 16), 0
            while place < len(data):
                length, found, _, _, _ = HEADER.unpack_from(data, place)
                answer = data[place + HEADER.size : place + length]
                place += (length + 3) & ~3
                if found == ERROR:
                    number = -int.from_bytes(answer[:4], "little", signed=True)
                    if number:
                        raise OSError(number, os.strerror(number))
                if found in {ERROR, DONE}:
                    return
                yield found, answer


def _text(kind: int, text: str) -> bytes:
    return _attribute(kind, text.encode() + b"\0")


def _attribute(kind: int, value: bytes) -> bytes:
    header = ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind)
    return header + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while place + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, place)
        yield kind, data[place + ATTRIBUTE.size : place + length]
        place += max((length + 3) & ~3, ATTRIBUTE.size)
