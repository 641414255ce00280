"""Messages, users, and what the kernel promises about a shut down Unix socket."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from pysmc.discovery import rendezvous
from pysmc.discovery.rendezvous import (
    GO,
    NO,
    SMC,
    Refusal,
    Users,
    answer_of,
    close_stranger,
    failed,
    foreign,
    overflow_uid,
    receive,
    refused,
    send,
)


def test_what_was_queued_before_the_shutdown_is_read_and_nothing_can_follow() -> None:
    server, client = socket.socketpair()
    with server, client:
        assert send(client, GO)
        server.shutdown(socket.SHUT_RD)
        assert not send(client, GO), "the kernel must refuse it (EPIPE)"
        assert receive(server) == GO
        assert receive(server) == b""


def test_an_answer_outlives_the_client_that_sent_it() -> None:
    server, client = socket.socketpair()
    with server:
        assert send(client, GO)
        client.close()
        server.shutdown(socket.SHUT_RD)
        assert receive(server) == GO


def test_receive_tells_nothing_yet_from_gone() -> None:
    server, client = socket.socketpair()
    with server:
        server.setblocking(False)
        assert receive(server) is None
        send(server, b"unread")
        client.close()  # with something unread, which the kernel makes an error
        assert receive(server) == b""
        assert not send(server, b"x")


@pytest.mark.parametrize(
    ("message", "name", "side"),
    [
        (b"", "MARK_LOST", "peer"),
        (b"?", "MARK_LOST", "peer"),
        (NO, "MARK_LOST", "peer"),
        (NO + bytes([Refusal.RAW]), "PEER_NO_SMC", "peer"),
        (NO + bytes([Refusal.FOREIGN]), "FOREIGN_USER", "peer"),
        (NO + bytes([Refusal.UNFIT]), "MARK_LOST", "peer"),
        (NO + b"\xff", "MARK_LOST", "peer"),
    ],
)
def test_answers_that_mean_tcp(message: bytes, name: str, side: str) -> None:
    verdict = answer_of(message)
    assert not verdict.smc
    assert verdict.reason is not None
    assert (verdict.reason.name, verdict.reason.side) == (name, side)


def test_the_answer_that_means_smc() -> None:
    assert answer_of(GO) == SMC


def test_refusal_of_a_later_version_is_shown_by_its_number() -> None:
    assert "reason 77" in str(refused(77).reason)


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (errno.EMFILE, "LIMIT"),
        (errno.ENFILE, "LIMIT"),
        (errno.EADDRINUSE, "MARK_LOST"),
    ],
)
def test_errors_have_their_reason(number: int, name: str) -> None:
    verdict = failed("It broke", OSError(number, os.strerror(number)))
    assert verdict.reason is not None
    assert verdict.reason.name == name
    assert os.strerror(number) in verdict.reason.text


class Peer:
    """A socket whose peer is any user we like."""

    def __init__(self, uid: int) -> None:
        self.uid = uid

    def getsockopt(self, *_: int) -> bytes:
        return rendezvous.UCRED.pack(1, self.uid, 0)


@pytest.mark.parametrize(
    ("uid", "allowed", "is_foreign"),
    [
        (0, (), False),
        (7, (), True),
        (7, (7,), False),
        (4_294_967_295, (), True),
    ],
)
def test_users(
    uid: int,
    allowed: tuple[int, ...],
    is_foreign: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    peer: object = Peer(uid)
    assert Users(allowed).foreign(peer) == (uid if is_foreign else None)  # type: ignore[arg-type]


def test_overflow_user_is_never_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    uid = overflow_uid()
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    peer: object = Peer(uid)
    assert Users((uid,)).foreign(peer) == uid  # type: ignore[arg-type]
    assert "user namespaces" in str(foreign(uid).reason)


def test_own_user_is_allowed_on_a_real_socket() -> None:
    server, client = socket.socketpair()
    with server, client:
        assert Users().foreign(server) is None


def test_overflow_user_has_a_default_without_proc(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "no /proc")

    overflow_uid.cache_clear()
    monkeypatch.setattr(Path, "read_text", fail)
    try:
        assert overflow_uid() == 65534
    finally:
        overflow_uid.cache_clear()


@pytest.mark.parametrize("has_thread", [True, False])
def test_a_stranger_is_closed_in_any_case(
    monkeypatch: pytest.MonkeyPatch, has_thread: bool
) -> None:
    taken: list[int] = []

    def close_elsewhere(descriptor: int) -> bool:
        if has_thread:
            taken.append(descriptor)
        return has_thread

    monkeypatch.setattr(rendezvous, "close_elsewhere", close_elsewhere)
    near, far = socket.socketpair()
    number = near.fileno()
    close_stranger(near)
    assert near.fileno() == -1
    assert taken == ([number] if has_thread else [])
    for descriptor in taken:
        os.close(descriptor)
    assert far.recv(1) == b""
    far.close()
