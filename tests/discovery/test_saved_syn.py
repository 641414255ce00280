"""The SYN that the kernel kept, and whether it shows the SMC option."""

from __future__ import annotations

import socket

import pytest

from pysmc.discovery.saved_syn import read_syn, shows_option

SMC = bytes.fromhex("fe06e2d4c3d9")
USUAL = bytes.fromhex("020405b40402080a0000000100000000")


def tcp_header(options: bytes) -> bytes:
    options += b"\1" * (-len(options) % 4)
    return bytes(12) + bytes([(20 + len(options)) // 4 << 4, 2]) + bytes(6) + options


def ipv4(options: bytes) -> bytes:
    return b"\x45" + bytes(19) + tcp_header(options)


HEADERS = {
    "IPv4": b"\x45" + bytes(19),
    "IPv4 with options": b"\x47" + bytes(27),
    "IPv6": b"\x60" + bytes(5) + b"\6" + bytes(33),
    "IPv6 with options": (
        b"\x60" + bytes(5) + b"\0" + bytes(33) + b"\x3c\0" + bytes(6)
        + b"\6\1" + bytes(14)
    ),
}  # fmt: skip


@pytest.mark.parametrize("above", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize("before", [b"", b"\1\1", USUAL])
def test_the_option_and_other_options(above: bytes, before: bytes) -> None:
    assert shows_option(above + tcp_header(before + SMC))
    assert shows_option(above + tcp_header(before + SMC + b"\1\1\3\3\7"))
    assert not shows_option(above + tcp_header(before))


@pytest.mark.parametrize(
    "other",
    [
        "fe06e2d4c3c4", "fd06e2d4c3d9", "fe08e2d4c3d90000", "fe04e2d4", "fe",
        "00" + SMC.hex(), "fe00" + SMC.hex(), "0201" + SMC.hex(),
        "1308" + SMC.hex(),
    ],
)  # fmt: skip
def test_what_only_looks_like_it(other: str) -> None:
    assert not shows_option(ipv4(bytes.fromhex(other)))


def test_what_is_cut_shows_nothing() -> None:
    for above in HEADERS.values():
        whole = above + tcp_header(USUAL[:6] + SMC)
        assert shows_option(whole)
        assert not any(shows_option(whole[:end]) for end in range(len(whole)))


def test_it_is_read_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, 27, 1)
        with socket.create_connection(listener.getsockname()):
            conn, _ = listener.accept()
            with conn:
                syn = read_syn(conn)
                assert syn[:1] == b"\x45"
                assert not shows_option(syn)
                assert read_syn(conn) == b""
