"""Discovery as its driver uses it: configuration, both ends, workers, forks, users."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from pysmc import discovery as discovery_module
from pysmc.discovery import Discovery, Mark, Verdict
from pysmc.discovery.address import endpoint
from pysmc.errors import ForkedError
from pysmc.reasons import Reason

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to become another user"
)
TOS = (socket.IPPROTO_IP, socket.IP_TOS)
OTHER_UID = 1000
OVERFLOW_UID = 65534


# --- configuration --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"fabrics": ()}, "DISABLED/local"),
        ({"discovery": ()}, "DISABLED/local"),
        ({"discovery": ("tcp_option",)}, "SETUP_MISSING/local"),
    ],
)
async def test_nothing_that_works_is_enabled(
    kit: Any, fields: dict[str, Any], name: str
) -> None:
    discovery = kit.discovery(**fields)
    listener = kit.listener()
    assert discovery.announce(listener) is None
    assert await kit.meet(discovery, discovery, listener) == (name, name)


async def test_an_option_that_is_not_built_beside_one_that_is(kit: Any) -> None:
    discovery = kit.discovery(discovery=("tcp_option", "local"))
    listener = kit.listener()
    discovery.announce(listener)
    assert await kit.meet(discovery, discovery, listener) == ("SMC", "SMC")


async def test_missing_option_says_so(kit: Any) -> None:
    reason = kit.discovery(discovery=("tcp_option",)).prepare(
        kit.client(), ("127.0.0.1", 9)
    )
    assert isinstance(reason, Reason)
    assert "'tcp_option' is not built" in reason.text


@pytest.mark.parametrize("order", [("static", "local"), ("local", "static")])
async def test_static_peers_need_no_mark(kit: Any, order: tuple[str, ...]) -> None:
    listener = kit.listener()
    port = listener.getsockname()[1]
    fields = {"discovery": order, "peers": (f"127.0.0.0/8:{port}",)}
    client, server = kit.discovery(**fields), kit.discovery(**fields)
    server.announce(listener)
    assert await kit.meet(client, server, listener) == ("SMC", "SMC")
    sock = kit.client()
    mark = client.prepare(sock, ("127.0.0.1", port))
    assert isinstance(mark, Mark)
    assert sock.getsockopt(*TOS) == 0
    client.settle_tcp(mark)


async def test_static_peers_that_are_not_listed(kit: Any) -> None:
    listener = kit.listener()
    static = kit.discovery(discovery=("static",), peers=("10.0.0.1",))
    nothing = ("PEER_NO_SMC/local", "PEER_NO_SMC/local")
    assert await kit.meet(static, static, listener) == nothing
    assert static.announce(listener) is None
    name = static.prepare(kit.client(), ("example.org", 80))
    assert kit.short(name) == "PEER_NO_SMC/local"


async def test_peers_not_listed_are_found_by_local(kit: Any) -> None:
    both = kit.discovery(discovery=("static", "local"), peers=("10.0.0.1",))
    listener = kit.listener()
    both.announce(listener)
    assert await kit.meet(both, both, listener) == ("SMC", "SMC")


async def test_static_server_of_a_connection_that_has_gone(kit: Any) -> None:
    static = kit.discovery(discovery=("static",), peers=("127.0.0.1",))
    assert kit.short(static.inspect(kit.client())) == "PEER_NO_SMC/local"
    left, right = socket.socketpair()
    kit.keep(right)
    assert kit.short(static.inspect(kit.keep(left))) == "PEER_NO_SMC/local"


async def test_bad_peers_are_refused(kit: Any) -> None:
    with pytest.raises(ValueError, match=r"peers contains 'example\.org'"):
        kit.discovery(discovery=("static",), peers=("example.org",))


async def test_no_unix_sockets(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid() -> None:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr(discovery_module, "Lookup", forbid)
    local = kit.discovery()
    reason = local.prepare(kit.client(), ("127.0.0.1", 9))
    assert kit.short(reason) == "SETUP_MISSING/local"
    assert os.strerror(errno.EAFNOSUPPORT) in reason.text
    assert local.announce(kit.listener()) is None
    both = kit.discovery(discovery=("static", "local"), peers=("127.0.0.1",))
    assert isinstance(both.prepare(kit.client(), ("127.0.0.1", 9)), Mark)


# --- both ends, over every kind of address --------------------------------------------

ADDRESSES = [
    ("127.0.0.1", "127.0.0.1"),
    ("127.0.0.1", "::ffff:127.0.0.1"),
    ("127.0.0.1", "0.0.0.0"),
    ("0.0.0.0", "127.0.0.1"),
    ("0.0.0.0", "127.3.2.1"),
    ("0.0.0.0", "::ffff:127.0.0.1"),
    ("::1", "::1"),
    ("::", "::1"),
    ("::", "::"),
    ("::", "127.0.0.1"),
    ("::", "::ffff:127.0.0.1"),
    ("::ffff:127.0.0.1", "127.0.0.1"),
    ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
]


@pytest.mark.parametrize(("bound", "dialled"), ADDRESSES)
async def test_both_ends_find_each_other(kit: Any, bound: str, dialled: str) -> None:
    client, server = kit.discovery(), kit.discovery()
    listener = kit.listener(bound)
    announcement = server.announce(listener)
    assert announcement.is_holder
    assert await kit.meet(client, server, listener, dialled) == ("SMC", "SMC")
    announcement.close()
    announcement.close()
    after = await kit.meet(client, server, listener, dialled)
    assert after == ("PEER_NO_SMC/peer", "PEER_NO_SMC/peer")


async def test_ipv6_only_listener_is_not_found_by_ipv4(kit: Any) -> None:
    discovery = kit.discovery()
    listener = kit.listener("::", v6only=True)
    discovery.announce(listener)
    address = ("127.0.0.1", listener.getsockname()[1])
    assert kit.short(discovery.prepare(kit.client(), address)) == "PEER_NO_SMC/peer"
    assert await kit.meet(discovery, discovery, listener, "::1") == ("SMC", "SMC")


async def test_two_listeners_of_one_port(kit: Any) -> None:
    """What a server on "localhost" makes."""
    discovery = kit.discovery()
    first = kit.listener("127.0.0.1")
    port = first.getsockname()[1]
    second = kit.listener("::1", port, v6only=True)
    announcements = [discovery.announce(first), discovery.announce(second)]
    for listener in (first, second):
        assert await kit.meet(discovery, discovery, listener) == ("SMC", "SMC")
    announcements[0].close()
    gone = kit.short(discovery.prepare(kit.client(), ("127.0.0.1", port)))
    assert gone == "PEER_NO_SMC/peer"
    assert await kit.meet(discovery, discovery, second) == ("SMC", "SMC")


def test_on_uvloop(make_kit: Any) -> None:
    async def main() -> None:
        kit = make_kit()
        client, server = kit.discovery(), kit.discovery()
        listener = kit.listener("::")
        server.announce(listener)
        for host in ("127.0.0.1", "::1"):
            assert await kit.meet(client, server, listener, host) == ("SMC", "SMC")
        _, mark, conn = await kit.marked_pair(client, server)
        client.settle_tcp(mark)
        assert kit.short(await server.confirm(conn)) == "PEER_NO_SMC/peer"
        kit.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


# --- one end is plain -----------------------------------------------------------------


async def test_plain_server(kit: Any) -> None:
    client = kit.discovery()
    listener = kit.listener()
    sock = kit.client()
    found = client.prepare(sock, listener.getsockname())
    assert kit.short(found) == "PEER_NO_SMC/peer"
    assert sock.getsockopt(*TOS) == 0


async def test_plain_client(kit: Any) -> None:
    server = kit.discovery()
    listener = kit.listener()
    server.announce(listener)
    sock = kit.client()
    await kit.loop.sock_connect(sock, listener.getsockname())
    conn = await kit.accept(listener)
    assert kit.short(server.inspect(conn)) == "PEER_NO_SMC/peer"


async def test_listeners_that_were_never_announced(kit: Any) -> None:
    server = kit.discovery()
    listener = kit.listener()
    sock = kit.client()
    await kit.loop.sock_connect(sock, listener.getsockname())
    conn = await kit.accept(listener)
    assert kit.short(server.inspect(conn)) == "NOT_MARKED/local"
    server.announce(kit.listener())
    assert kit.short(server.inspect(conn)) == "NOT_MARKED/local"
    unix, other = socket.socketpair()
    kit.keep(other)
    assert kit.short(server.inspect(kit.keep(unix))) == "NOT_MARKED/local"


async def test_mark_is_off_once_connected(kit: Any) -> None:
    client, server = kit.discovery(), kit.discovery()
    sock, mark, conn = await kit.marked_pair(client, server)
    assert sock.getsockopt(*TOS) == 0
    verdicts = await asyncio.gather(client.wait_confirmed(mark), server.confirm(conn))
    assert list(verdicts) == [Verdict(smc=True), Verdict(smc=True)]


async def test_server_that_vanishes_between_beacon_and_connect(kit: Any) -> None:
    client, server = kit.discovery(), kit.discovery()
    listener = kit.listener()
    address = listener.getsockname()
    server.announce(listener)
    sock = kit.client()
    mark = client.prepare(sock, address)
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        await kit.loop.sock_connect(sock, address)
    client.settle_tcp(mark)
    assert sock.getsockopt(*TOS) == 0
    client.connected(mark)
    assert kit.short(await client.wait_confirmed(mark)) == "NOT_MARKED/local"


async def test_a_socket_that_connects_again_after_a_failure(kit: Any) -> None:
    client, server = kit.discovery(), kit.discovery()
    listener = kit.listener()
    address = listener.getsockname()
    server.announce(listener)
    sock = kit.client()
    first = client.prepare(sock, address)
    second = client.prepare(sock, address)
    assert kit.short(first.verdict) == "NOT_MARKED/local"
    await kit.loop.sock_connect(sock, address)
    client.connected(second)
    conn = await kit.accept(listener)
    assert server.inspect(conn) is True
    verdicts = await asyncio.gather(client.wait_confirmed(second), server.confirm(conn))
    assert [kit.short(verdict) for verdict in verdicts] == ["SMC", "SMC"]


async def test_a_plain_program_takes_the_port_over(kit: Any) -> None:
    client, server = kit.discovery(discovery_wait=0.05), kit.discovery()
    listener = kit.listener(reuse_port=True)
    host, port = listener.getsockname()
    server.announce(listener)
    sock = kit.client()
    mark = client.prepare(sock, (host, port))
    other = kit.listener(host, port, reuse_port=True)
    listener.close()
    await kit.loop.sock_connect(sock, (host, port))
    client.connected(mark)
    conn = await kit.accept(other)
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/peer"
    sock.send(b"hello")
    assert await kit.loop.sock_recv(conn, 99) == b"hello"


async def test_a_stranger_on_a_more_specific_address(kit: Any) -> None:
    client, server = kit.discovery(discovery_wait=0.05), kit.discovery()
    wildcard = kit.listener("0.0.0.0", reuse_port=True)
    port = wildcard.getsockname()[1]
    server.announce(wildcard)
    stranger = kit.listener("127.0.0.1", port, reuse_port=True)
    sock, mark = await kit.dial(client, "127.0.0.1", port)
    conn = await kit.accept(stranger)
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/peer"
    sock.send(b"hello")
    assert await kit.loop.sock_recv(conn, 99) == b"hello"


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "client", "server"),
    [
        ("plain", "SMC", "SMC"),
        ("syncookies", "MARK_LOST/peer", "MARK_LOST/local"),
        ("stranger", "MARK_LOST/peer", "plain"),
        ("redirect_to_plain", "MARK_LOST/peer", "plain"),
        ("redirect_to_pysmc", "MARK_LOST/peer", "MARK_LOST/peer"),
        ("dscp_cleared", "MARK_LOST/peer", "PEER_NO_SMC/peer"),
        ("nonlocal_bind", "SMC", "SMC"),
        ("link_local", "SMC", "SMC"),
        ("remote_dscp", "hello", "PEER_NO_SMC/peer"),
    ],
)
def test_in_a_network_of_its_own(
    scenario: str, client: str, server: str, tests_folder: Path
) -> None:
    program = tests_folder / "netns_program.py"
    ended = subprocess.run(
        ["unshare", "--net", sys.executable, str(program), scenario],
        capture_output=True,
        check=False,
        timeout=50,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    result = json.loads(ended.stdout)
    assert (result["client"], result["server"]) == (client, server)
    assert result["received"] == result["echoed"] == "hello", "not a byte more or less"
    wait = 0.2
    assert result["client_seconds"] < wait + 0.1
    assert result.get("server_seconds", 0) < wait / 2 + 0.1
    assert result.get("elsewhere", "PEER_NO_SMC/peer") == "PEER_NO_SMC/peer"


# --- sockets that cannot be marked or announced ---------------------------------------


async def announced(kit: Any) -> tuple[Discovery, tuple[str, int]]:
    discovery = kit.discovery()
    listener = kit.listener()
    discovery.announce(listener)
    return discovery, listener.getsockname()


@pytest.mark.parametrize(
    "address", ["/run/some.socket", b"\0abstract", ("localhost", 80), (1, "2")]
)
async def test_addresses_that_are_not_tcp_or_not_numeric(
    kit: Any, address: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    discovery = kit.discovery()
    monkeypatch.setattr(discovery._lookup, "has_port", lambda _: True)
    found = discovery.prepare(kit.client(), address)
    assert kit.short(found) == "SETUP_MISSING/local"


async def test_datagram_sockets_are_not_marked(kit: Any) -> None:
    discovery, address = await announced(kit)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        assert kit.short(discovery.prepare(sock, address)) == "SETUP_MISSING/local"


async def test_the_applications_own_tos_forbids_the_mark(kit: Any) -> None:
    discovery, address = await announced(kit)
    sock = kit.client()
    sock.setsockopt(*TOS, 0x10)
    found = discovery.prepare(sock, address)
    assert isinstance(found, Reason)
    assert kit.short(found) == "SETUP_MISSING/local"
    assert "TOS" in found.text
    assert sock.getsockopt(*TOS) == 0x10


async def test_a_socket_that_cannot_take_the_mark(kit: Any) -> None:
    discovery = kit.discovery()
    listener = kit.listener("::1")
    discovery.announce(listener)
    found = discovery.prepare(kit.client("127.0.0.1"), listener.getsockname())
    assert kit.short(found) == "SETUP_MISSING/local"


async def test_sockets_bound_to_a_device(kit: Any) -> None:
    discovery, address = await announced(kit)
    sock, listener = kit.client(), kit.listener()
    for bound in (sock, listener):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    found = discovery.prepare(sock, address)
    assert isinstance(found, Reason)
    assert kit.short(found) == "SETUP_MISSING/local"
    assert "SO_BINDTODEVICE" in found.text
    assert discovery.announce(listener) is None


async def test_what_is_not_announced(kit: Any) -> None:
    discovery = kit.discovery()
    unix = kit.keep(socket.socket(socket.AF_UNIX))
    datagrams = kit.keep(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    unbound = kit.keep(socket.socket())
    closed = socket.socket()
    closed.close()
    for sock in (unix, datagrams, unbound, closed):
        assert discovery.announce(sock) is None


async def test_announcing_twice_is_announcing_once(kit: Any) -> None:
    discovery = kit.discovery()
    listener = kit.listener()
    first = discovery.announce(listener)
    assert discovery.announce(listener) is first
    first.close()
    second = discovery.announce(listener)
    assert second is not first
    assert second.is_holder


async def test_a_listener_works_without_its_beacon(
    kit: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    discovery = kit.discovery()
    listener = kit.listener()
    hold = discovery._registry.hold
    calls = 0

    def fail_second(name: bytes) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return hold(name)

    monkeypatch.setattr(discovery._registry, "hold", fail_second)
    assert discovery.announce(listener) is None
    assert "Too many open files" in caplog.text
    reasons = await kit.meet(discovery, discovery, listener)
    assert reasons == ("PEER_NO_SMC/peer", "NOT_MARKED/local")


# --- system calls ---------------------------------------------------------------------

COUNTED = """
import asyncio, os, socket
from pysmc.config import Config
from pysmc.discovery import Discovery
async def main():
    discovery = Discovery(asyncio.get_running_loop(), Config())
    listener = socket.create_server(("127.0.0.1", 0))
    plain = socket.create_server(("127.0.0.1", 0))
    discovery.announce(listener)
    client = socket.create_connection(listener.getsockname())
    conn, _ = listener.accept()
    sock, address = socket.socket(), plain.getsockname()
    os.write(1, b"before")
    discovery.inspect(conn)
    os.write(1, b"after")
    os.write(1, b"before")
    discovery.prepare(sock, address)
    os.write(1, b"after")
asyncio.run(main())
"""


@pytest.mark.skipif(
    shutil.which("strace") is None,
    reason="needs the program strace: apt-get install -y strace",
)
def test_a_plain_peer_costs_one_system_call(tmp_path: Path) -> None:
    log = tmp_path / "strace"
    command = ["strace", "-f", "-o", str(log), sys.executable, "-c", COUNTED]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    counts = [
        Counter(re.findall(r"^\d+ (\w+)\(", part.split('"after"')[0], re.MULTILINE))
        for part in log.read_text("utf-8").split('"before"')[1:]
    ]
    for count in counts:
        del count["write"]
    assert counts == [{"getsockopt": 1}, {"connect": 1}]


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
        verdict = kit.short(await server.confirm(conn) if found is True else found)
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
        assert server.inspect(conn) is True
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
    client, server = kit.discovery(), kit.discovery()
    listener = kit.listener()
    announcement = server.announce(listener)
    sock, mark = await kit.dial(client, *listener.getsockname())
    conn = await kit.accept(listener)
    assert server.inspect(conn) is True
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


# --- the end --------------------------------------------------------------------------


async def test_close_gives_a_verdict_to_whoever_waits(kit: Any) -> None:
    client, server = kit.discovery(), kit.discovery()
    _, mark, conn = await kit.marked_pair(client, server)
    waiting = kit.loop.create_task(client.wait_confirmed(mark))
    await kit.until(lambda: mark._claim is not None)
    client.close()
    client.close()
    assert kit.short(await waiting) == "MARK_LOST/local"
    confirming = kit.loop.create_task(server.confirm(conn))
    await kit.until(lambda: server._offers)
    server.close()
    assert kit.short(await confirming) == "MARK_LOST/peer"


async def test_close_of_a_server_whose_offer_is_held(kit: Any) -> None:
    client, server = kit.discovery(), kit.discovery()
    _, mark, conn = await kit.marked_pair(client, server)
    confirming = kit.loop.create_task(server.confirm(conn))
    await kit.until(lambda: mark._offered)
    server.close()
    assert kit.short(await confirming) == "MARK_LOST/peer"
    assert kit.short(await client.wait_confirmed(mark)) == "MARK_LOST/peer"


async def test_closed_discovery_refuses_with_what_happened(kit: Any) -> None:
    discovery = kit.discovery()
    discovery.announce(kit.listener())
    discovery.close()
    with pytest.raises(RuntimeError, match="closed"):
        discovery.prepare(kit.client(), ("127.0.0.1", 9))


async def test_loop_of_its_own_has_names_of_its_own(kit: Any) -> None:
    """Two loops of one process are like two workers."""
    first, second = kit.discovery(), kit.discovery()
    listener = kit.listener()
    announcements = [first.announce(listener), second.announce(listener)]
    assert [made.is_holder for made in announcements] == [True, False]
    announcements[0].close()
    await kit.until(lambda: announcements[1].is_holder)
    assert await kit.meet(first, second, listener) == ("SMC", "SMC")


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
    assert server.inspect(conn) is True
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
