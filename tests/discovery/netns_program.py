"""One scenario in a network namespace of its own; prints what both ends decided.

Usage: unshare --net python netns_program.py SCENARIO
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from typing import Any

from pysmc.config import Config
from pysmc.discovery import Discovery, Mark, Verdict
from pysmc.discovery.order import Way

WAIT = 0.2


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def sysctl(name: str, value: int) -> None:
    path = "/proc/sys/net/" + name.replace(".", "/")
    with open(path, "w", encoding="ascii") as file:
        file.write(str(value))


def short(verdict: Any) -> str:
    if isinstance(verdict, Verdict):
        if verdict.smc:
            return "SMC"
        verdict = verdict.reason
    return f"{verdict.name}/{verdict.side}"


def listen(host: str, port: int = 0, scope: int = 0) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    address = (host, port, 0, scope) if ":" in host else (host, port)
    sock.bind(address)
    sock.listen()
    return sock


class Ends:
    """A client, any number of listeners, and what they decide."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.client = Discovery(self.loop, Config(discovery_wait=WAIT))
        self.server = Discovery(self.loop, Config(discovery_wait=WAIT))
        self.result: dict[str, Any] = {}

    async def serve(self, listener: socket.socket) -> None:
        conn, _ = await self.loop.sock_accept(listener)
        found = self.server.inspect(conn)
        begin = self.loop.time()
        self.result["server"] = short(
            await self.server.confirm(conn) if isinstance(found, Way) else found
        )
        self.result["server_seconds"] = self.loop.time() - begin
        self.result["received"] = await self.receive(conn)

    async def serve_plainly(self, listener: socket.socket) -> None:
        """Play a program that knows nothing of SMC: it echoes."""
        conn, _ = await self.loop.sock_accept(listener)
        self.result["server"] = "plain"
        self.result["received"] = await self.receive(conn)

    async def receive(self, conn: socket.socket) -> str:
        data = await self.loop.sock_recv(conn, 99)
        await self.loop.sock_sendall(conn, data)
        conn.close()
        return data.decode("ascii")

    async def dial(self, address: Any) -> None:
        """Connect, decide, and exchange the application's first bytes."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family) as sock:
            sock.setblocking(False)
            mark = self.client.prepare(sock, address)
            await self.loop.sock_connect(sock, address)
            begin = self.loop.time()
            if isinstance(mark, Mark):
                self.client.connected(mark)
                self.result["client"] = short(await self.client.wait_confirmed(mark))
            else:
                self.result["client"] = short(mark)
            self.result["client_seconds"] = self.loop.time() - begin
            await self.loop.sock_sendall(sock, b"hello")
            self.result["echoed"] = (await self.loop.sock_recv(sock, 99)).decode(
                "ascii"
            )

    def announce(self, listener: socket.socket) -> int:
        assert self.server.announce(listener) is not None
        port: int = listener.getsockname()[1]
        return port


async def plain(ends: Ends) -> None:
    """The same as the others, with nothing in the way."""
    listener = listen("127.0.0.1")
    port = ends.announce(listener)
    await asyncio.gather(ends.serve(listener), ends.dial(("127.0.0.1", port)))


async def syncookies(ends: Ends) -> None:
    """Every SYN is answered with a cookie: nothing of it is kept."""
    sysctl("ipv4.tcp_syncookies", 2)
    await plain(ends)


async def stranger(ends: Ends) -> None:
    """A program without SMC listens on a more specific address."""
    wildcard = listen("0.0.0.0")
    port = ends.announce(wildcard)
    specific = listen("127.0.0.1", port)
    await asyncio.gather(ends.serve_plainly(specific), ends.dial(("127.0.0.1", port)))


def redirect(port: int, to: int) -> None:
    run("nft", "add table ip nat")
    chain = "{ type nat hook output priority -100; }"
    run("nft", f"add chain ip nat output {chain}")
    run("nft", f"add rule ip nat output tcp dport {port} redirect to :{to}")


async def redirect_to_plain(ends: Ends) -> None:
    """Netfilter sends the connection to a program without SMC."""
    port = ends.announce(listen("127.0.0.1"))
    other = listen("0.0.0.0")
    redirect(port, other.getsockname()[1])
    await asyncio.gather(ends.serve_plainly(other), ends.dial(("127.0.0.1", port)))


async def redirect_to_pysmc(ends: Ends) -> None:
    """Netfilter sends the connection to another listener of ours: another 4-tuple."""
    port = ends.announce(listen("127.0.0.1"))
    other = listen("0.0.0.0")
    redirect(port, ends.announce(other))
    await asyncio.gather(ends.serve(other), ends.dial(("127.0.0.1", port)))


async def dscp_cleared(ends: Ends) -> None:
    """Netfilter rewrites the DSCP, so the mark does not arrive."""
    run("nft", "add table ip mangle")
    chain = "{ type filter hook output priority -150; }"
    run("nft", f"add chain ip mangle output {chain}")
    run("nft", "add rule ip mangle output ip dscp set 0")
    await plain(ends)


async def nonlocal_bind(ends: Ends) -> None:
    """Any address can be bound, and still only the host's own ones are local."""
    for version in ("ipv4", "ipv6"):
        sysctl(f"{version}.ip_nonlocal_bind", 1)
    listener = listen("::")
    port = ends.announce(listener)
    with socket.socket() as sock:
        ends.result["elsewhere"] = short(ends.client.prepare(sock, ("192.0.2.1", port)))
    await asyncio.gather(ends.serve(listener), ends.dial(("127.0.0.7", port)))


async def link_local(ends: Ends) -> None:
    """The address and its scope name a device; both ends see the same one."""
    run("ip", "link", "add", "left", "type", "veth", "peer", "name", "right")
    for device in ("left", "right"):
        sysctl(f"ipv6.conf.{device}.accept_dad", 0)
        run("ip", "link", "set", device, "up")
    run("ip", "addr", "add", "fe80::77/64", "dev", "left", "nodad")
    scope = socket.if_nametoindex("left")
    listener = listen("fe80::77", scope=scope)
    port = ends.announce(listener)
    await asyncio.gather(ends.serve(listener), ends.dial(("fe80::77", port, 0, scope)))


async def remote_dscp(ends: Ends) -> None:
    """A client of another host happens to use the same DSCP."""
    run("ip", "link", "add", "near", "type", "veth", "peer", "name", "far")
    run("ip", "addr", "add", "10.7.0.1/24", "dev", "near")
    run("ip", "link", "set", "near", "up")
    listener = listen("10.7.0.1")
    port = ends.announce(listener)
    child = await asyncio.create_subprocess_exec(
        *("unshare", "--net", sys.executable, __file__, "remote_client", str(port)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert await child.stdout.readline() == b"in my own namespace\n"
    run("ip", "link", "set", "far", "netns", str(child.pid))
    child.stdin.write(b"the device is there\n")
    await ends.serve(listener)
    ends.result["client"] = (await child.stdout.readline()).decode("ascii").strip()
    ends.result["echoed"] = ends.result["client"]
    ends.result["client_seconds"] = 0.0
    await child.wait()


def remote_client(port: int) -> None:
    """Play that other host."""
    os.write(1, b"in my own namespace\n")
    assert os.read(0, 99) == b"the device is there\n"
    run("ip", "addr", "add", "10.7.0.2/24", "dev", "far")
    run("ip", "link", "set", "far", "up")
    with socket.socket() as sock:
        sock.settimeout(10)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 0x2C)
        sock.connect(("10.7.0.1", port))
        sock.send(b"hello")
        os.write(1, sock.recv(99) + b"\n")


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        plain,
        syncookies,
        stranger,
        redirect_to_plain,
        redirect_to_pysmc,
        dscp_cleared,
        nonlocal_bind,
        link_local,
        remote_dscp,
    )
}


async def main(name: str) -> None:
    run("ip", "link", "set", "lo", "up")
    ends = Ends()
    await asyncio.wait_for(SCENARIOS[name](ends), 15)
    ends.client.close()
    ends.server.close()
    os.write(1, json.dumps(ends.result).encode("ascii"))


if __name__ == "__main__":
    if sys.argv[1] == "remote_client":
        remote_client(int(sys.argv[2]))
    else:
        asyncio.run(main(sys.argv[1]))
