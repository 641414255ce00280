"""Discovery between processes: workers, other users, forks and kills."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.discovery.address import endpoint
from pysmc.discovery.order import Way
from pysmc.errors import ForkedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.discovery import Discovery, Mark

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to become another user"
)
OTHER_UID = 1000
OVERFLOW_UID = 65534


# --- workers, users, forks ------------------------------------------------------------


async def _worker(
    say: Callable[[Any], None],
    make_kit: Callable[[], Any],
    address: tuple[str, int],
    inherited: socket.socket | None,
) -> None:
    kit = make_kit()
    server = kit.discovery()
    listener = inherited or kit.listener(*address, reuse_port=True)
    announcement = server.announce(listener)
    say(announcement.is_holder)

    async def serve(conn: socket.socket) -> None:
        found = server.inspect(conn)
        verdict = kit.short(
            await server.confirm(conn) if isinstance(found, Way) else found
        )
        await kit.loop.sock_sendall(conn, f"{os.getpid()} {verdict}".encode())
        conn.close()

    serving: set[asyncio.Task[None]] = set()
    while True:
        conn, _ = await kit.loop.sock_accept(listener)
        task = kit.loop.create_task(serve(conn))
        serving.add(task)
        task.add_done_callback(serving.discard)


async def _connect_many(
    kit: Any, address: tuple[str, int], count: int
) -> tuple[set[int], list[str]]:
    """Connect at once; return who answered, and all verdicts of both ends."""
    client = kit.discovery()
    verdicts: list[str] = []

    async def connect() -> int:
        sock, mark = await kit.dial(client, *address)
        verdicts.append(kit.short(await client.wait_confirmed(mark)))
        pid, verdict = (await kit.loop.sock_recv(sock, 99)).decode().split()
        verdicts.append(verdict)
        sock.close()
        return int(pid)

    pids = await asyncio.gather(*(connect() for _ in range(count)))
    client.close()
    return set(pids), verdicts


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SO_REUSEPORT", "inherited"])
def test_four_workers(make_kit: Any, fork: Any, how: str) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        address = listener.getsockname()
        if how == "inherited":
            listener.listen(128)
            listener.setblocking(False)
        inherited = listener if how == "inherited" else None
        children = [fork(_worker, make_kit, address, inherited) for _ in range(4)]
    roles = [child.hear() for child in children]
    assert roles.count(True) == 1

    async def main() -> None:
        kit = make_kit()
        probe = kit.discovery()
        # The one that announces is killed each time; another must take over.
        while len(children) > 1:
            pids, verdicts = await _connect_many(kit, address, 40)
            assert set(verdicts) == {"SMC"}
            assert pids <= {child.pid for child in children}
            holder = _holder_of(address[1])
            (victim,) = [child for child in children if child.pid == holder]
            victim.end()
            children.remove(victim)
            await kit.until(lambda: probe._lookup.has_port(address[1]))
            await kit.until(lambda: probe._lookup.has_address(_endpoint(address)))
            await kit.until(lambda: _holder_of(address[1]))
        kit.close()

    asyncio.run(main())


def _endpoint(address: tuple[str, int]) -> Any:
    found = endpoint(address)
    assert found is not None
    return found


def _holder_of(port: int) -> int | None:
    """Find the process that holds a port's keeper, by the creator of its listener."""
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(b"\0pysmc/k/1/%d" % port)
        except OSError:
            return None
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], sys.byteorder)


async def _client_of_another_user(
    say: Callable[[Any], None],
    make_kit: Callable[[], Any],
    address: tuple[str, int],
    uid: int,
    allowed: tuple[int, ...],
) -> None:
    os.setgid(uid)
    os.setuid(uid)
    kit = make_kit()
    client = kit.discovery(allowed_uids=allowed)
    _, mark = await kit.dial(client, *address)
    say(kit.short(await client.wait_confirmed(mark)))
    kit.close()


@needs_root
@pytest.mark.parametrize(
    ("uid", "at_client", "at_server", "client_says", "server_says"),
    [
        (OTHER_UID, (), (), "FOREIGN_USER/local", "FOREIGN_USER/local"),
        (OTHER_UID, (0,), (OTHER_UID,), "SMC", "SMC"),
        (OTHER_UID, (0,), (), "FOREIGN_USER/peer", "FOREIGN_USER/local"),
        (OTHER_UID, (), (OTHER_UID,), "FOREIGN_USER/local", "FOREIGN_USER/peer"),
        (
            OVERFLOW_UID,
            (0, OVERFLOW_UID),
            (OVERFLOW_UID,),
            "FOREIGN_USER/peer",
            "FOREIGN_USER/local",
        ),
    ],
)
def test_another_user(
    make_kit: Any,
    fork: Any,
    uid: int,
    at_client: tuple[int, ...],
    at_server: tuple[int, ...],
    client_says: str,
    server_says: str,
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)

    async def main() -> None:
        kit = make_kit()
        server = kit.discovery(allowed_uids=at_server)
        server.announce(listener)
        child = fork(
            _client_of_another_user, make_kit, listener.getsockname(), uid, at_client
        )
        conn = await kit.accept(listener)
        assert server.inspect(conn) is Way.LOCAL
        begin = kit.loop.time()
        assert kit.short(await server.confirm(conn)) == server_says
        assert kit.loop.time() - begin < 0.4, "nobody waited for a deadline"
        assert await child.heard() == client_says
        kit.close()

    with listener:
        asyncio.run(main())


async def _use_the_parents(
    say: Callable[[Any], None],
    discovery: Discovery,
    listener: socket.socket,
    conn: socket.socket,
    mark: Mark,
) -> None:
    uses: list[Callable[[], Any]] = [
        lambda: discovery.announce(listener),
        lambda: discovery.inspect(conn),
        lambda: discovery.prepare(conn, ("127.0.0.1", 9)),
        lambda: discovery.connected(mark),
        lambda: discovery.settle_tcp(mark),
    ]
    waits: list[Callable[[], Any]] = [
        lambda: discovery.confirm(conn),
        lambda: discovery.wait_confirmed(mark),
    ]
    refused = 0
    for use in uses:
        try:
            use()
        except ForkedError:
            refused += 1
    for wait in waits:
        try:
            await wait()
        except ForkedError:
            refused += 1
    discovery.close()
    say(refused)


async def test_a_child_cannot_use_the_parents_and_does_it_no_harm(
    kit: Any, fork: Any, make_kit: Any
) -> None:
    # Two children come and go before the mark is looked at.
    client, server = (kit.discovery(discovery_wait=30.0) for _ in range(2))
    listener = kit.listener()
    announcement = server.announce(listener)
    sock, mark = await kit.dial(client, *listener.getsockname())
    conn = await kit.accept(listener)
    assert server.inspect(conn) is Way.LOCAL
    for discovery in (client, server):
        child = fork(_use_the_parents, discovery, listener, conn, mark)
        assert await child.heard() == 7
        await child.finish()
    verdicts = await asyncio.gather(client.wait_confirmed(mark), server.confirm(conn))
    assert [kit.short(verdict) for verdict in verdicts] == ["SMC", "SMC"]
    assert announcement.is_holder
    assert await kit.meet(client, server, listener) == ("SMC", "SMC")
    assert sock.fileno() >= 0


async def _serve_inherited(
    say: Callable[[Any], None],
    make_kit: Callable[[], Any],
    parents: Any,
    listener: socket.socket,
) -> None:
    parents.close()
    kit = make_kit()
    server = kit.discovery()
    announcement = server.announce(listener)
    say(announcement.is_holder)
    await kit.until(lambda: announcement.is_holder)
    say("took over")
    kit.close()


async def test_a_child_may_make_its_own(kit: Any, fork: Any, make_kit: Any) -> None:
    server = kit.discovery()
    listener = kit.listener()
    announcement = server.announce(listener)
    child = fork(_serve_inherited, make_kit, announcement, listener)
    assert await child.heard() is False, "the parent announces it already"
    assert announcement.is_holder, "the child's close was its copy's"
    announcement.close()
    assert await child.heard() == "took over"
    await child.finish()


async def _close_coroutine(say: Callable[[Any], None], task: asyncio.Task[Any]) -> None:
    coroutine = task.get_coro()
    assert coroutine is not None
    coroutine.close()
    gc.collect()
    say("closed")


@pytest.mark.parametrize("end", ["client", "server"])
async def test_what_a_child_collects_stays_registered_in_the_parent(
    kit: Any, fork: Any, end: str
) -> None:
    """Parent and child share one epoll; the child must not take anything out of it."""
    client = kit.discovery(discovery_wait=30.0)
    server = kit.discovery(discovery_wait=30.0)
    sock, mark, conn = await kit.marked_pair(client, server)
    if end == "client":
        task = kit.loop.create_task(client.wait_confirmed(mark))
        await kit.until(lambda: mark._claim is not None)
    else:
        client.close()
        task = kit.loop.create_task(server.confirm(conn))
        await kit.until(lambda: server._offers)
    child = fork(_close_coroutine, task)
    assert await child.heard() == "closed"
    await child.finish()
    (conn if end == "client" else sock).send(b"hello")
    verdict = await asyncio.wait_for(task, 5)
    assert kit.short(verdict) == "MARK_LOST/peer"


async def test_killed_server_ends_the_clients_wait(
    kit: Any, fork: Any, make_kit: Any
) -> None:
    client = kit.discovery(discovery_wait=30.0)
    child = fork(_accept_and_stop, make_kit)
    address = tuple(await child.heard())
    _, mark = await kit.dial(client, *address)
    waiting = kit.loop.create_task(client.wait_confirmed(mark))
    assert await child.heard() == "accepted"
    child.kill(signal.SIGKILL)
    assert kit.short(await asyncio.wait_for(waiting, 5)) == "MARK_LOST/peer"


async def _accept_and_stop(
    say: Callable[[Any], None], make_kit: Callable[[], Any]
) -> None:
    kit = make_kit()
    listener = kit.listener()
    kit.discovery().announce(listener)
    say(listener.getsockname())
    await kit.accept(listener)
    say("accepted")
    await kit.after(60)


async def test_killed_client_ends_the_servers_wait(
    kit: Any, fork: Any, make_kit: Any
) -> None:
    server = kit.discovery(discovery_wait=30.0)
    listener = kit.listener()
    server.announce(listener)
    child = fork(_hold_an_offer, make_kit, listener.getsockname())
    conn = await kit.accept(listener)
    assert server.inspect(conn) is Way.LOCAL
    confirming = kit.loop.create_task(server.confirm(conn))
    assert await child.heard() == "offered"
    child.kill(signal.SIGKILL)
    assert kit.short(await asyncio.wait_for(confirming, 5)) == "MARK_LOST/peer"


async def _hold_an_offer(
    say: Callable[[Any], None], make_kit: Callable[[], Any], address: tuple[str, int]
) -> None:
    kit = make_kit()
    _, mark = await kit.dial(kit.discovery(), *address)
    await kit.until(lambda: mark._offered)
    say("offered")
    signal.pause()
