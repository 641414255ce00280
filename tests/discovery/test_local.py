"""The rendezvous: every way in which the two ends may or may not agree."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.discovery import Mark
from pysmc.discovery import local as local_module
from pysmc.discovery import offer as offer_module
from pysmc.discovery.address import connection_id
from pysmc.discovery.order import Way
from pysmc.discovery.rendezvous import (
    GO,
    NO,
    OFFER,
    REFUSE,
    VERSION,
    Refusal,
)
from pysmc.errors import LocalProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

FOREIGN_UID = 1000


class OtherServer:
    """Plays a server by hand, towards a marked client socket."""

    def __init__(self, sock: socket.socket, name: bytes) -> None:
        self.identity = connection_id(sock, client=True)
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.connect(name)
        self.unix.setblocking(False)

    async def say(self, message: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.unix, message)

    async def hear(self) -> bytes:
        try:
            loop = asyncio.get_running_loop()
            return await asyncio.wait_for(loop.sock_recv(self.unix, 64), 5)
        except ConnectionResetError:
            return b""

    @property
    def offer(self) -> bytes:
        return OFFER + bytes([VERSION]) + self.identity


@pytest.fixture
def other_server(kit: Any) -> Callable[[socket.socket], OtherServer]:
    def make(sock: socket.socket) -> OtherServer:
        made = OtherServer(sock, kit.rendezvous_of(sock))
        kit.keep(made.unix)
        return made

    return make


# --- both want ------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["client", "server"])
async def test_both_ends_agree_whoever_asks_first(
    kit: Any, ends: Any, first: str
) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    waits = [client.wait_confirmed(mark), server.confirm(conn)]
    if first == "server":
        waits.reverse()
    verdicts = await asyncio.gather(*waits)
    assert [kit.short(verdict) for verdict in verdicts] == ["SMC", "SMC"]
    assert kit.short(await client.wait_confirmed(mark)) == "SMC", "it stays so"


async def test_server_is_earlier_than_the_clients_connect(kit: Any, ends: Any) -> None:
    client, server = ends
    listener = kit.listener()
    server.announce(listener)
    address = listener.getsockname()
    sock = kit.client()
    mark = client.prepare(sock, address)
    await kit.loop.sock_connect(sock, address)
    conn = await kit.accept(listener)
    assert server.inspect(conn) is Way.LOCAL
    confirmed = kit.loop.create_task(server.confirm(conn))
    await kit.after(0.02)
    client.connected(mark)
    assert kit.short(await client.wait_confirmed(mark)) == "SMC"
    assert kit.short(await confirmed) == "SMC"


@pytest.mark.parametrize(("spin", "timers"), [(1000.0, False), (0.0, True)])
async def test_server_looks_at_each_turn_before_it_sets_a_timer(
    kit: Any, ends: Any, monkeypatch: pytest.MonkeyPatch, spin: float, timers: bool
) -> None:
    monkeypatch.setattr(offer_module, "SPIN", spin)
    client, server = ends
    listener = kit.listener()
    server.announce(listener)
    address = listener.getsockname()
    sock = kit.client()
    mark = client.prepare(sock, address)
    await kit.loop.sock_connect(sock, address)
    conn = await kit.accept(listener)
    confirmed = kit.loop.create_task(server.confirm(conn))
    await kit.after(0.004)
    (offer,) = server._offers
    client.connected(mark)
    assert kit.short(await client.wait_confirmed(mark)) == "SMC"
    assert kit.short(await confirmed) == "SMC"
    assert (offer._delay > offer_module.RETRY_FIRST) is timers


async def test_offer_is_held_for_a_socket_that_is_claimed_later(
    kit: Any, ends: Any
) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    confirmed = kit.loop.create_task(server.confirm(conn))
    await kit.until(lambda: mark._offered)
    assert not confirmed.done()
    assert kit.short(await client.wait_confirmed(mark)) == "SMC"
    assert kit.short(await confirmed) == "SMC"


async def test_claim_after_the_unclaimed_wait_but_before_any_offer(
    kit: Any, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "UNCLAIMED_WAIT", 0.001)
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    await kit.until(lambda: mark._declining)
    verdicts = await asyncio.gather(client.wait_confirmed(mark), server.confirm(conn))
    assert [kit.short(verdict) for verdict in verdicts] == ["SMC", "SMC"]


# --- the client does not want ---------------------------------------------------------


async def test_raw_user_makes_the_server_wait_not_at_all(kit: Any, ends: Any) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    client.settle_tcp(mark)
    client.settle_tcp(mark)
    assert kit.short(await server.confirm(conn)) == "PEER_NO_SMC/peer"
    assert kit.short(await client.wait_confirmed(mark)) == "NOT_MARKED/local"


async def test_raw_use_answers_the_offer_that_is_held(kit: Any, ends: Any) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    confirmed = kit.loop.create_task(server.confirm(conn))
    await kit.until(lambda: mark._offered)
    client.settle_tcp(mark)
    assert kit.short(await confirmed) == "PEER_NO_SMC/peer"
    assert kit.short(mark.verdict) == "NOT_MARKED/local"


async def test_raw_use_ends_a_wait(kit: Any, ends: Any) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    waiting = kit.loop.create_task(client.wait_confirmed(mark))
    await kit.until(lambda: mark._claim is not None)
    client.settle_tcp(mark)
    assert kit.short(await waiting) == "NOT_MARKED/local"
    conn_verdict = kit.loop.create_task(server.confirm(conn))
    await kit.after(0.005)
    # The client sends now, which tells the server that no rendezvous will come.
    sock = mark._sock()
    assert sock is not None
    sock.send(b"hello")
    assert kit.short(await conn_verdict) == "MARK_LOST/peer"
    assert conn.recv(9) == b"hello"


async def test_nobody_claims_the_socket(
    kit: Any, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "UNCLAIMED_WAIT", 0.01)
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    assert kit.short(await server.confirm(conn)) == "PEER_NO_SMC/peer"
    assert kit.short(await client.wait_confirmed(mark)) == "NOT_MARKED/local"


async def test_an_unclaimed_mark_that_declines_vanishes(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_module, "UNCLAIMED_WAIT", 0.001)
    client, server = kit.discovery(discovery_wait=0.02), kit.discovery()
    before = kit.count_descriptors()
    sock, mark, conn = await kit.marked_pair(client, server)
    await kit.until(lambda: mark.verdict is not None)
    assert kit.short(mark.verdict) == "MARK_LOST/peer"
    sock.send(b"raw")
    assert kit.short(await server.confirm(conn)) == "MARK_LOST/peer"
    beacon, listener, tcp = 4, 1, 2
    assert kit.count_descriptors() == before + beacon + listener + tcp


async def test_a_settled_mark_vanishes_too(kit: Any) -> None:
    client, server = kit.discovery(discovery_wait=0.02), kit.discovery()
    _, mark, _ = await kit.marked_pair(client, server)
    client.settle_tcp(mark)
    assert mark._listener is not None
    await kit.until(lambda: mark._listener is None)
    assert kit.short(mark.verdict) == "NOT_MARKED/local"
    assert client._open_marks == set()


async def test_the_program_closes_the_socket_before_claiming_it(
    kit: Any, ends: Any
) -> None:
    client, server = ends
    sock, mark, conn = await kit.marked_pair(client, server)
    sock.close()
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/local"
    assert kit.short(await server.confirm(conn)) == "MARK_LOST/peer"


async def test_the_program_drops_the_socket(kit: Any, ends: Any) -> None:
    client, server = ends
    sock, mark, conn = await kit.marked_pair(client, server)
    kit.sockets.remove(sock)
    sock.close()
    del sock
    await kit.until(lambda: kit.count_descriptors() and mark._sock() is None)
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/local"
    assert kit.short(await server.confirm(conn)) == "MARK_LOST/peer"


async def test_the_socket_is_dropped_before_it_is_connected(
    kit: Any, ends: Any
) -> None:
    client, server = ends
    listener = kit.listener()
    server.announce(listener)
    sock = kit.client()
    mark = client.prepare(sock, listener.getsockname())
    kit.sockets.remove(sock)
    sock.close()
    del sock
    await kit.until(lambda: kit.count_descriptors() and mark._sock() is None)
    client.connected(mark)
    assert kit.short(mark.verdict) == "MARK_LOST/local"


async def test_cancelled_client(kit: Any, ends: Any) -> None:
    client, server = ends
    sock, mark, conn = await kit.marked_pair(client, server)
    waiting = kit.loop.create_task(client.wait_confirmed(mark))
    await kit.until(lambda: mark._claim is not None)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert kit.short(mark.verdict) == "MARK_LOST/local"
    sock.close()  # as whoever cancels a connect does
    assert kit.short(await server.confirm(conn)) == "MARK_LOST/peer"


async def test_client_that_gives_up_in_time(kit: Any) -> None:
    client = kit.discovery(discovery_wait=0.01)
    server = kit.discovery(discovery_wait=0.02)
    _, mark, conn = await kit.marked_pair(client, server)
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/peer"
    assert "0.01 s" in str(mark.verdict.reason)
    assert kit.short(await server.confirm(conn)) == "MARK_LOST/peer"


# --- the server speaks first, or goes -------------------------------------------------


async def test_a_server_that_speaks_first_is_no_smc_server(kit: Any, ends: Any) -> None:
    client, server = ends
    sock, mark, conn = await kit.marked_pair(client, server)
    waiting = kit.loop.create_task(client.wait_confirmed(mark))
    await kit.until(lambda: mark._claim is not None)
    conn.send(b"220 ready")
    assert kit.short(await waiting) == "MARK_LOST/peer"
    assert sock.recv(99) == b"220 ready", "it was not read"


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_a_server_that_goes_ends_the_wait(kit: Any, ends: Any, end: str) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    waiting = kit.loop.create_task(client.wait_confirmed(mark))
    await kit.until(lambda: mark._claim is not None)
    conn.close() if end == "close" else kit.reset(conn)
    assert kit.short(await waiting) == "MARK_LOST/peer"


# --- a server that does not keep to the rules -----------------------------------------


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize("what", ["version", "identity", "noise"])
async def test_an_offer_for_something_else_is_declined(
    kit: Any, ends: Any, other_server: Any, claimed: bool, what: str
) -> None:
    client, server = ends
    sock, mark, _ = await kit.marked_pair(client, server)
    waiting = kit.loop.create_task(client.wait_confirmed(mark)) if claimed else None
    other = other_server(sock)
    messages = {
        "version": OFFER + bytes([VERSION + 1]) + other.identity,
        "identity": OFFER + bytes([VERSION]) + bytes(len(other.identity)),
        "noise": b"GET / HTTP/1.1",
    }
    await other.say(messages[what])
    assert await other.hear() == NO + bytes([Refusal.UNFIT])
    verdict = await (waiting or client.wait_confirmed(mark))
    assert kit.short(verdict) == "MARK_LOST/local"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (REFUSE + bytes([Refusal.FOREIGN]), "FOREIGN_USER/peer"),
        (REFUSE + bytes([Refusal.UNFIT]), "MARK_LOST/peer"),
        (REFUSE, "MARK_LOST/peer"),
    ],
)
async def test_a_refusal_is_understood(
    kit: Any, ends: Any, other_server: Any, message: bytes, expected: str
) -> None:
    client, server = ends
    sock, mark, _ = await kit.marked_pair(client, server)
    waiting = kit.loop.create_task(client.wait_confirmed(mark))
    await other_server(sock).say(message)
    assert kit.short(await waiting) == expected


async def test_a_visitor_that_says_nothing_does_no_harm(
    kit: Any, ends: Any, other_server: Any
) -> None:
    client, server = ends
    sock, mark, conn = await kit.marked_pair(client, server)
    waiting = kit.loop.create_task(client.wait_confirmed(mark))
    visitor, second = other_server(sock), other_server(sock)
    await kit.until(lambda: mark._conn is not None)
    assert await second.hear() == b"", "one at a time"
    visitor.unix.close()
    await kit.until(lambda: mark._conn is None)
    assert kit.short(await server.confirm(conn)) == "SMC"
    assert kit.short(await waiting) == "SMC"


async def test_an_offer_that_was_withdrawn_while_it_was_held(
    kit: Any, ends: Any, other_server: Any
) -> None:
    client, server = ends
    sock, mark, _ = await kit.marked_pair(client, server)
    other = other_server(sock)
    await other.say(other.offer)
    await kit.until(lambda: mark._offered)
    other.unix.close()
    await kit.until(lambda: mark.verdict is not None)
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/peer"


async def test_go_cannot_be_sent_once_the_server_stopped_reading(
    kit: Any, ends: Any, other_server: Any
) -> None:
    client, server = ends
    sock, mark, _ = await kit.marked_pair(client, server)
    other = other_server(sock)
    await other.say(other.offer)
    await kit.until(lambda: mark._offered)
    other.unix.shutdown(socket.SHUT_RD)
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/peer"
    assert await other.hear() == b""


async def test_a_connection_that_was_reset_is_not_agreed_on(
    kit: Any, ends: Any, other_server: Any
) -> None:
    client, server = ends
    sock, mark, conn = await kit.marked_pair(client, server)
    other = other_server(sock)
    await other.say(other.offer)
    await kit.until(lambda: mark._offered)
    kit.reset(conn)
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/local"
    assert await other.hear() == NO + bytes([Refusal.UNFIT])


async def test_spurious_wake_of_the_rendezvous(kit: Any, ends: Any) -> None:
    client, server = ends
    _, mark, _ = await kit.marked_pair(client, server)
    mark._on_connection()
    assert mark.verdict is None


async def test_offer_in_two_pieces_of_time(
    kit: Any, ends: Any, other_server: Any
) -> None:
    client, server = ends
    sock, mark, _ = await kit.marked_pair(client, server)
    waiting = kit.loop.create_task(client.wait_confirmed(mark))
    other = other_server(sock)
    await kit.until(lambda: mark._conn is not None)
    await other.say(other.offer)
    assert await other.hear() == GO
    assert kit.short(await waiting) == "SMC"


# --- users ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("who", "client_says", "server_says"),
    [
        ("both", "FOREIGN_USER/local", "FOREIGN_USER/local"),
        ("client", "FOREIGN_USER/local", "FOREIGN_USER/peer"),
        ("server", "FOREIGN_USER/peer", "FOREIGN_USER/local"),
    ],
)
async def test_a_user_that_is_not_allowed(
    kit: Any,
    ends: Any,
    who: str,
    client_says: str,
    server_says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    for name, end in (("client", client), ("server", server)):
        if who in {name, "both"}:
            monkeypatch.setattr(end._users, "foreign", lambda _: FOREIGN_UID)
    verdicts = await asyncio.gather(client.wait_confirmed(mark), server.confirm(conn))
    assert [kit.short(verdict) for verdict in verdicts] == [client_says, server_says]


# --- errors ---------------------------------------------------------------------------


async def test_mark_that_is_not_connected_cannot_be_waited_for(
    kit: Any, ends: Any
) -> None:
    client, server = ends
    listener = kit.listener()
    server.announce(listener)
    mark = client.prepare(kit.client(), listener.getsockname())
    assert isinstance(mark, Mark)
    with pytest.raises(LocalProtocolError, match="connected"):
        await client.wait_confirmed(mark)


async def test_only_one_task_may_wait(kit: Any, ends: Any) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    first = kit.loop.create_task(client.wait_confirmed(mark))
    await kit.until(lambda: mark._claim is not None)
    with pytest.raises(LocalProtocolError, match="another task"):
        await client.wait_confirmed(mark)
    assert kit.short(await server.confirm(conn)) == "SMC"
    assert kit.short(await first) == "SMC"


async def test_connected_twice_is_connected_once(kit: Any, ends: Any) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    client.connected(mark)
    verdicts = await asyncio.gather(client.wait_confirmed(mark), server.confirm(conn))
    assert [kit.short(verdict) for verdict in verdicts] == ["SMC", "SMC"]


async def test_name_of_the_rendezvous_is_taken(kit: Any) -> None:
    client, server = kit.discovery(), kit.discovery(discovery_wait=0.02)
    listener = kit.listener()
    server.announce(listener)
    sock = kit.client()
    address = listener.getsockname()
    mark = client.prepare(sock, address)
    await kit.loop.sock_connect(sock, address)
    conn = await kit.accept(listener)
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(kit.rendezvous_of(sock))
        client.connected(mark)
        verdict = await client.wait_confirmed(mark)
        assert kit.short(verdict) == "MARK_LOST/local"
        assert "in use" in str(verdict.reason)
        assert kit.short(await server.confirm(conn)) == "MARK_LOST/peer"


def no_descriptor() -> socket.socket:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


async def test_no_descriptor_for_the_rendezvous(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = kit.discovery(), kit.discovery(discovery_wait=0.02)
    monkeypatch.setattr(local_module, "stream_socket", no_descriptor)
    _, mark, conn = await kit.marked_pair(client, server)
    monkeypatch.undo()
    assert kit.short(await client.wait_confirmed(mark)) == "LIMIT/local"
    assert kit.short(await server.confirm(conn)) == "MARK_LOST/peer"
    assert client._open_marks == set()


async def test_no_descriptor_for_the_offer(
    kit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = kit.discovery(discovery_wait=0.02), kit.discovery()
    _, mark, conn = await kit.marked_pair(client, server)
    monkeypatch.setattr(offer_module, "stream_socket", no_descriptor)
    assert kit.short(await server.confirm(conn)) == "LIMIT/local"
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/peer"


async def test_no_descriptor_to_accept_the_offer(
    kit: Any, ends: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = ends
    _, mark, conn = await kit.marked_pair(client, server)
    real = mark._listener

    class Full:
        fileno, close = real.fileno, real.close
        accept = staticmethod(no_descriptor)

    mark._listener = Full()
    verdicts = await asyncio.gather(client.wait_confirmed(mark), server.confirm(conn))
    assert kit.short(verdicts[0]) == "LIMIT/local"
    assert kit.short(verdicts[1]) == "MARK_LOST/peer"
