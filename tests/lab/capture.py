"""Captures of the lab's network: taken by tcpdump, read here and by tshark.

Two readings that know nothing of each other: `frames` finds the messages of SMC-R by
their place in the packets (Ethernet, IPv4, then TCP or RoCE) and leaves their bytes to
smcproto; `dissected` is what tshark makes of the same packets.

Source: pcap-savefile(5); InfiniBand Architecture Specification 1.4, section 9.2 (base
transport header) and annex A17 (RoCEv2).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Dissected", "Frame", "captured", "dissected", "frames", "tcp_streams"]

ROCE_PORT = 4791
END_PORT = 9
END = b"the end of this capture"
DEADLINE = 20.0
HEADER_BYTES, RECORD_BYTES = 24, 16
ETHERNET_BYTES, BTH_BYTES, ICRC_BYTES = 14, 12, 4
SENDS = {0: "first", 1: "middle", 2: "last", 4: "only"}
"""RoCE opcodes of a reliable connection's SEND without immediate data."""
WRITES = {6, 7, 8, 10}


class Frame(NamedTuple):
    """One packet, as far as it is of interest."""

    number: int
    """From 1, as tshark counts."""
    kind: str
    """"tcp", "send", "write", or "" for any other."""
    flow: tuple[str, int, str, int]
    """Source address and port, destination address and port; for RoCE the port of the
    destination is its queue pair."""
    sequence: int
    """Of TCP; the packet sequence number of RoCE."""
    payload: bytes
    """Of TCP, of a whole SEND, or of a part of a WRITE."""


class Dissected(NamedTuple):
    """What tshark says of a packet."""

    protocols: tuple[str, ...]
    is_malformed: bool
    severity: int
    """The highest of its expert's remarks; 8388608 is an error, 6291456 a warning."""
    remarks: str


@contextmanager
def captured(path: Path, device: str = "va") -> Iterator[None]:
    """Capture everything on a network device while the block lasts.

    Args:
        path: Where to, in memory: a slow file system would lose packets.
        device: Which one.
    """
    command = ["tcpdump", "-i", device, "-B", "32768", "-s", "0", "-w", str(path)]
    with subprocess.Popen([*command, "-n"], stderr=subprocess.PIPE) as process:
        try:
            _wait_listening(process)
            yield
            _flush(process, path)
        finally:
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            words = process.stderr.read().decode()
    assert "\n0 packets dropped by kernel" in words, words


def _wait_listening(process: subprocess.Popen[bytes]) -> None:
    assert process.stderr is not None
    words = b""
    end = time.monotonic() + DEADLINE
    while b"listening on" not in words:
        left = end - time.monotonic()
        ready = select.select([process.stderr], [], [], max(0.0, left))[0]
        assert ready, f"tcpdump does not listen: {words!r}"
        data = os.read(process.stderr.fileno(), 1 << 12)
        assert data, f"tcpdump has ended: {words!r}"
        words += data


def _flush(process: subprocess.Popen[bytes], path: Path) -> None:
    """Wait until a packet that is sent now has reached the file."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as marker:
        marker.bind(("10.0.0.1", 0))
        marker.sendto(END, ("10.0.0.2", END_PORT))
    end = time.monotonic() + DEADLINE
    while END not in path.read_bytes():
        assert time.monotonic() < end, "the last packet is not in the capture"
        process.send_signal(signal.SIGUSR2)  # write what is buffered
        select.select([], [], [], 0.2)


def frames(data: bytes) -> Iterator[Frame]:
    """Read a capture, packet by packet."""
    assert data[:4] == b"\xd4\xc3\xb2\xa1", "a capture of this machine's byte order"
    place, number = HEADER_BYTES, 0
    while place < len(data):
        number += 1
        (size,) = struct.unpack_from("<I", data, place + 8)
        place += RECORD_BYTES
        yield _frame(number, data[place : place + size])
        place += size


def _frame(number: int, packet: bytes) -> Frame:
    ip = packet[ETHERNET_BYTES:]
    if packet[12:14] != b"\x08\x00":
        return Frame(number, "", ("", 0, "", 0), 0, b"")
    header, total = (ip[0] & 15) * 4, int.from_bytes(ip[2:4], "big")
    source, target = socket.inet_ntoa(ip[12:16]), socket.inet_ntoa(ip[16:20])
    body = ip[header:total]
    ports = struct.unpack_from("!HH", body)
    flow = (source, ports[0], target, ports[1])
    if ip[9] == socket.IPPROTO_TCP:
        start = (body[12] >> 4) * 4
        sequence = int.from_bytes(body[4:8], "big")
        return Frame(number, "tcp", flow, sequence, body[start:])
    if ip[9] != socket.IPPROTO_UDP or ports[1] != ROCE_PORT:
        return Frame(number, "", flow, 0, b"")
    transport = body[8:]
    opcode, padding = transport[0], transport[1] >> 4 & 3
    pair = int.from_bytes(transport[5:8], "big")
    sequence = int.from_bytes(transport[9:12], "big")
    payload = transport[BTH_BYTES : len(transport) - ICRC_BYTES - padding]
    kind = "send" if opcode in SENDS else "write" if opcode in WRITES else ""
    return Frame(number, kind, (source, ports[0], target, pair), sequence, payload)


def tcp_streams(found: list[Frame]) -> dict[tuple[str, int, str, int], bytes]:
    """Put the bytes of each direction of each TCP connection together."""
    pieces: dict[tuple[str, int, str, int], dict[int, bytes]] = {}
    for frame in found:
        if frame.kind == "tcp" and frame.payload:
            pieces.setdefault(frame.flow, {}).setdefault(frame.sequence, frame.payload)
    return {
        flow: b"".join(payload for _, payload in sorted(parts.items()))
        for flow, parts in pieces.items()
    }


def dissected(path: Path) -> dict[int, Dissected]:
    """Let tshark read a capture; gives what it says by the packet's number."""
    names = ("frame.number", "frame.protocols", "_ws.malformed", "_ws.expert.severity")
    fields = [word for name in (*names, "_ws.expert.message") for word in ("-e", name)]
    done = subprocess.run(
        ["tshark", "-n", "-r", str(path), "-T", "fields", "-E", "separator=|", *fields],
        capture_output=True,
        text=True,
        check=True,
    )
    found = {}
    for line in done.stdout.splitlines():
        number, protocols, malformed, severities, remarks = line.split("|", 4)
        severity = max((int(one) for one in severities.split(",") if one), default=0)
        found[int(number)] = Dissected(
            tuple(protocols.split(":")), bool(malformed), severity, remarks
        )
    return found
