"""The server's end of the rendezvous, towards clients of every kind."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any

import pytest

from pysmc.discovery import offer as offer_module
from pysmc.discovery.address import connection_id
from pysmc.discovery.rendezvous import GO, NO, OFFER, REFUSE, VERSION, Refusal, Users
from pysmc.reasons import reason


class OtherClient:
    """Plays a client by hand, towards a server of ours."""

    def __init__(self, sock: socket.socket, name: bytes) -> None:
        self.identity = connection_id(sock, client=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(name)
        self.listener.listen()
        self.listener.setblocking(False)
        self.unix: socket.socket | None = None

    async def hear(self) -> bytes:
        loop = asyncio.get_running_loop()
        if self.unix is None:
            self.unix, _ = await loop.sock_accept(self.listener)
        return await loop.sock_recv(self.unix, 128)

    async def say(self, message: bytes) -> None:
        assert self.unix is not None
        await asyncio.get_running_loop().sock_sendall(self.unix, message)

    def close(self) -> None:
        self.listener.close()
        if self.unix is not None:
            self.unix.close()


# --- a client that does not keep to the rules -----------------------------------------


async def test_nobody_at_the_rendezvous(kit: Any) -> None:
    server = kit.discovery(discovery_wait=0.05)
    _, conn = await kit.unmarked_pair()
    begin = kit.loop.time()
    assert kit.short(await server.confirm(conn)) == "MARK_LOST/peer"
    assert kit.loop.time() - begin >= 0.024


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GO, "SMC"),
        (NO + bytes([Refusal.RAW]), "PEER_NO_SMC/peer"),
        (NO + bytes([Refusal.FOREIGN]), "FOREIGN_USER/peer"),
        (NO + bytes([Refusal.UNFIT]), "MARK_LOST/peer"),
        (b"what?", "MARK_LOST/peer"),
    ],
)
async def test_answers(kit: Any, ends: Any, answer: bytes, expected: str) -> None:
    _, server = ends
    sock, conn = await kit.unmarked_pair()
    other = OtherClient(sock, kit.rendezvous_of(sock))
    confirmed = kit.loop.create_task(server.confirm(conn))
    assert await other.hear() == OFFER + bytes([VERSION]) + other.identity
    await other.say(answer)
    assert kit.short(await confirmed) == expected
    other.close()


async def test_client_dies_before_the_offer(kit: Any, ends: Any) -> None:
    _, server = ends
    sock, conn = await kit.unmarked_pair()
    confirmed = kit.loop.create_task(server.confirm(conn))
    await kit.after(0.003)
    sock.close()
    assert kit.short(await confirmed) == "MARK_LOST/peer"


async def test_client_dies_after_the_offer(kit: Any, ends: Any) -> None:
    _, server = ends
    sock, conn = await kit.unmarked_pair()
    other = OtherClient(sock, kit.rendezvous_of(sock))
    confirmed = kit.loop.create_task(server.confirm(conn))
    await other.hear()
    other.close()
    assert kit.short(await confirmed) == "MARK_LOST/peer"


async def test_client_is_gone_before_confirm(kit: Any, ends: Any) -> None:
    _, server = ends
    sock, conn = await kit.unmarked_pair()
    kit.reset(sock)
    assert kit.short(await server.confirm(conn)) == "MARK_LOST/local"


async def test_name_belongs_to_a_newer_connection(
    kit: Any, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection ends after its name was made and before it is offered."""
    _, server = ends
    sock, conn = await kit.unmarked_pair()
    other = OtherClient(sock, kit.rendezvous_of(sock))
    confirm = server.confirm(conn)
    foreign = Users.foreign

    def end_meanwhile(users: Users, unix: socket.socket) -> int | None:
        kit.reset(sock)
        return foreign(users, unix)

    monkeypatch.setattr(Users, "foreign", end_meanwhile)
    assert kit.short(await confirm) == "MARK_LOST/local"
    assert await other.hear() == REFUSE + bytes([Refusal.UNFIT])
    other.close()


@pytest.mark.parametrize(
    ("last_words", "expected"),
    [
        (b"", "MARK_LOST/peer"),
        (NO + bytes([Refusal.FOREIGN]), "FOREIGN_USER/peer"),
        (GO, "MARK_LOST/peer"),  # there was no offer that it could have meant
    ],
)
async def test_client_that_closes_its_rendezvous_as_we_offer(
    kit: Any,
    ends: Any,
    monkeypatch: pytest.MonkeyPatch,
    last_words: bytes,
    expected: str,
) -> None:
    _, server = ends
    sock, conn = await kit.unmarked_pair()
    other = OtherClient(sock, kit.rendezvous_of(sock))

    def close_meanwhile(*_: object) -> None:
        other.unix, _ = other.listener.accept()
        other.unix.send(last_words)
        other.close()

    monkeypatch.setattr(Users, "foreign", close_meanwhile)
    assert kit.short(await server.confirm(conn)) == expected


async def test_server_that_gives_up_reads_what_was_answered(kit: Any) -> None:
    """The answer is queued, but the deadline is served first."""
    server = kit.discovery(discovery_wait=0.02)
    sock, conn = await kit.unmarked_pair()
    other = OtherClient(sock, kit.rendezvous_of(sock))
    confirmed = kit.loop.create_task(server.confirm(conn))
    await other.hear()
    await other.say(GO)
    (offer,) = server._offers
    offer._give_up()
    offer._give_up()
    assert kit.short(await confirmed) == "SMC"
    other.close()


async def test_server_that_gives_up_cannot_be_answered(kit: Any) -> None:
    server = kit.discovery(discovery_wait=0.02)
    sock, conn = await kit.unmarked_pair()
    other = OtherClient(sock, kit.rendezvous_of(sock))
    confirmed = kit.loop.create_task(server.confirm(conn))
    await other.hear()
    assert kit.short(await confirmed) == "MARK_LOST/peer"
    with pytest.raises(OSError, match=r"pipe|reset"):
        await other.say(GO)
    other.close()


async def test_first_bytes_on_tcp_do_not_hide_the_answer(kit: Any, ends: Any) -> None:
    """A client may send its first message right after GO."""
    _, server = ends
    sock, conn = await kit.unmarked_pair()
    other = OtherClient(sock, kit.rendezvous_of(sock))
    confirmed = kit.loop.create_task(server.confirm(conn))
    await other.hear()
    await other.say(GO)
    sock.send(b"proposal")
    (offer,) = server._offers
    offer._loop.remove_reader(offer._unix.fileno())  # let TCP be seen first
    assert kit.short(await confirmed) == "SMC"
    assert conn.recv(99) == b"proposal"
    other.close()


async def test_client_that_sends_instead_of_answering_is_tcp(
    kit: Any, ends: Any
) -> None:
    _, server = ends
    sock, conn = await kit.unmarked_pair()
    other = OtherClient(sock, kit.rendezvous_of(sock))
    confirmed = kit.loop.create_task(server.confirm(conn))
    await other.hear()
    sock.send(b"hello")
    assert kit.short(await confirmed) == "MARK_LOST/peer"
    assert conn.recv(99) == b"hello"
    other.close()


async def test_somebody_elses_use_of_the_same_dscp(
    kit: Any, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = ends
    monkeypatch.setattr(offer_module, "is_local", lambda _: False)
    _, conn = await kit.unmarked_pair()
    assert kit.short(await server.confirm(conn)) == "PEER_NO_SMC/peer"


async def test_client_that_is_reset_while_it_is_looked_for(
    kit: Any, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = ends
    sock, conn = await kit.unmarked_pair()

    class Resetting(socket.socket):
        def connect_ex(self, _: Any, /) -> int:
            kit.reset(sock)
            return errno.ECONNREFUSED

    monkeypatch.setattr(offer_module, "stream_socket", lambda: Resetting(1))
    assert kit.short(await server.confirm(conn)) == "PEER_NO_SMC/peer"


async def test_name_that_must_not_be_reached(
    kit: Any, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, server = ends
    _, conn = await kit.unmarked_pair()

    class Forbidden(socket.socket):
        def connect_ex(self, _: Any, /) -> int:
            return errno.EACCES

    monkeypatch.setattr(offer_module, "stream_socket", lambda: Forbidden(1))
    assert kit.short(await server.confirm(conn)) == "MARK_LOST/local"


async def test_cancelled_server(kit: Any, ends: Any) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    before = kit.count_descriptors()
    confirmed = kit.loop.create_task(server.confirm(conn))
    await kit.until(lambda: mark._offered)
    confirmed.cancel()
    with pytest.raises(asyncio.CancelledError):
        await confirmed
    conn.close()  # as it must be
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/peer"
    assert server._offers == set()
    listener_and_conn = 2
    assert kit.count_descriptors() == before - listener_and_conn


# --- a server that has no room --------------------------------------------------------

FULL = reason("LIMIT", "local", "max_handshakes is 1.")


async def test_a_client_beyond_a_limit_is_told_at_once(kit: Any, ends: Any) -> None:
    client, server = ends
    sock, mark, conn = await kit.marked_pair(client, server)
    waiting = kit.loop.create_task(client.wait_confirmed(mark))
    verdict = await server.confirm(conn, instead=FULL)
    assert verdict.reason is FULL
    told = (await waiting).reason
    assert (told.name, told.side) == ("LIMIT", "peer")
    assert "max_handshakes" in told.text
    assert sock.fileno() > 0


async def test_nobody_to_be_told_of_a_limit(kit: Any) -> None:
    server = kit.discovery(discovery_wait=0.05)
    _, conn = await kit.unmarked_pair()
    verdict = await server.confirm(conn, instead=FULL)
    assert not verdict.smc
    assert verdict.process is None


async def test_the_client_s_process_is_known(kit: Any, ends: Any) -> None:
    _, server = ends
    sock, conn = await kit.unmarked_pair()
    other = OtherClient(sock, kit.rendezvous_of(sock))
    confirmed = kit.loop.create_task(server.confirm(conn))
    await other.hear()
    await other.say(GO)
    assert (await confirmed).process == os.getpid()
    other.close()
