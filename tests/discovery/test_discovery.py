"""Discovery as its driver uses it: configuration, both ends, workers, forks, users."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from pysmc import discovery as discovery_module
from pysmc.discovery import Discovery, Mark, Verdict
from pysmc.discovery.order import Way
from pysmc.reasons import Reason

if TYPE_CHECKING:
    from pathlib import Path

TOS = (socket.IPPROTO_IP, socket.IP_TOS)


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


async def test_an_option_that_is_not_installed_beside_what_works(kit: Any) -> None:
    discovery = kit.discovery(discovery=("tcp_option", "local"))
    listener = kit.listener()
    discovery.announce(listener)
    assert await kit.meet(discovery, discovery, listener) == ("SMC", "SMC")


async def test_missing_option_says_so(kit: Any) -> None:
    reason = kit.discovery(discovery=("tcp_option",)).prepare(
        kit.client(), ("127.0.0.1", 9)
    )
    assert isinstance(reason, Reason)
    assert "'pysmc option attach'" in reason.text


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


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
async def test_no_descriptor_for_a_moment(
    kit: Any, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def lack() -> None:
        raise OSError(code, os.strerror(code))

    target = ("127.0.0.1", 9)
    with monkeypatch.context() as patch:
        patch.setattr(discovery_module, "Lookup", lack)
        local = kit.discovery()
        assert kit.short(local.prepare(kit.client(), target)) == "LIMIT/local"
    assert kit.short(local.prepare(kit.client(), target)) != "LIMIT/local"
    assert local._lookup is not None


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
    assert server.inspect(conn) is Way.LOCAL
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
    discovery.opt_in(listener)
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
        Counter(re.findall(r"^\d+ +(\w+)\(", part.split('"after"')[0], re.MULTILINE))
        for part in log.read_text("utf-8").split('"before"')[1:]
    ]
    for count in counts:
        del count["write"]
    assert counts == [{"getsockopt": 1}, {"connect": 1}]


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


async def test_closed_discovery_still_takes_a_mark_off(kit: Any) -> None:
    client, server = kit.discovery(), kit.discovery()
    listener = kit.listener()
    server.announce(listener)
    sock = kit.client()
    mark = client.prepare(sock, listener.getsockname())
    client.close()
    client.settle_tcp(mark)
    assert sock.getsockopt(*TOS) == 0


async def test_loop_of_its_own_has_names_of_its_own(kit: Any) -> None:
    """Two loops of one process are like two workers."""
    first, second = kit.discovery(), kit.discovery()
    listener = kit.listener()
    announcements = [first.announce(listener), second.announce(listener)]
    assert [made.is_holder for made in announcements] == [True, False]
    announcements[0].close()
    await kit.until(lambda: announcements[1].is_holder)
    assert await kit.meet(first, second, listener) == ("SMC", "SMC")
