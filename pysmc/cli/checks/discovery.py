"""Checks of the ways by which one end learns that the other speaks SMC.

Decides whether each way works here; none of them sends anything to another host.

Source: RFC 2474 (the mark), tcp(7), unix(7); pysmc.discovery.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

from pysmc.cli.checks.check import check, fail, ok, skip, warn
from pysmc.config import Config

if TYPE_CHECKING:
    from pysmc.cli.checks.check import Finding
    from pysmc.cli.checks.machine import Machine
    from pysmc.info import ConnectionInfo

__all__ = ["CHECKS"]

SYNCOOKIES = "/proc/sys/net/ipv4/tcp_syncookies"
DEADLINE = 3.0
"""Seconds for each thing that is waited for."""
CONNECTION_SECONDS = 10.0
"""Seconds for a whole connection, from its handshake to its end."""


@check(
    "local.cookies",
    looks_at="net.ipv4.tcp_syncookies: 2 means that every SYN is answered by a cookie.",
    means="A SYN cookie forgets the mark of the SYN, so that no connection is"
    " recognised by the discovery 'local': all stay TCP (MARK_LOST).",
    remedy="sysctl -w net.ipv4.tcp_syncookies=1",
)
def cookies(machine: Machine) -> Finding:
    """Look at the setting of SYN cookies."""
    value = machine.number(SYNCOOKIES)
    if value is None:
        return ok("Not known here: net.ipv4.tcp_syncookies cannot be read.")
    seen = f"net.ipv4.tcp_syncookies is {value}."
    return fail(seen) if value == 2 else ok(seen)


@check(
    "local.mark",
    looks_at="A marked connection over loopback, IPv4 and IPv6: the client's DSCP has"
    " to be seen in the saved SYN at the server.",
    means="The discovery 'local' does not recognise connections; they stay TCP.",
    remedy="Look for a rule of the packet filter that changes the DSCP on loopback, and"
    " for a sandbox that forbids setsockopt.",
    needs=("kernel", "local.cookies"),
)
def mark(machine: Machine) -> Finding:
    """Try the mark."""
    del machine
    seen = []
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        name = "IPv4" if family == socket.AF_INET else "IPv6"
        try:
            was_marked = _mark_arrives(family, host)
        except OSError as error:
            if family == socket.AF_INET:
                return fail(f"It could not be tried: {error}.")
            seen.append(f"{name} is not there ({error.strerror or error})")
        else:
            if not was_marked:
                return fail(f"The mark did not arrive over {name}.")
            seen.append(f"{name} keeps the mark")
    return ok(f"{'; '.join(seen)}.")


def _mark_arrives(family: int, host: str) -> bool:
    from pysmc.discovery.mark import read_mark, save_syn, set_mark

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(family))
        client = stack.enter_context(socket.socket(family))
        for sock in (listener, client):
            sock.settimeout(DEADLINE)
        save_syn(listener)
        listener.bind((host, 0))
        listener.listen(1)
        set_mark(client, ipv4=family == socket.AF_INET)
        client.connect(listener.getsockname())
        accepted = stack.enter_context(listener.accept()[0])
        return read_mark(accepted) is True


@check(
    "local.connection",
    looks_at="A connection of a pysmc loop with itself over 127.0.0.1: whether both"
    " ends say that it is SMC-R.",
    means="What the checks before this one looked at works, but not together.",
    remedy="docs/reference/reasons.md explains the reason; report it if that is"
    " INTERNAL.",
    needs=("local.mark", "shm.exchange"),
    seconds=3 * CONNECTION_SECONDS,
)
def connection(machine: Machine) -> Finding:
    """Connect for real, with the defaults, and say what it came to."""
    del machine
    try:
        info = _connect()
    except (OSError, TimeoutError) as error:
        return fail(f"The connection failed: {error!r}.")
    if info.mode != "smcr":
        return fail(f"The connection is plain TCP: {info.reason}")
    return ok(f"A connection of this host is SMC-R {info.version} over {info.fabric}.")


def _connect() -> ConnectionInfo:
    from pysmc.aio.loop import new_event_loop

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(1))
        await writer.drain()
        writer.close()

    async def main() -> ConnectionInfo:
        async with asyncio.timeout(CONNECTION_SECONDS):
            server = await asyncio.start_server(serve, "127.0.0.1", 0)
            async with server:
                port = server.sockets[0].getsockname()[1]
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"x")
                await reader.read()
                info: ConnectionInfo = writer.get_extra_info("smc")
                writer.close()
                await writer.wait_closed()
                return info

    with asyncio.Runner(loop_factory=lambda: new_event_loop(Config())) as runner:
        return runner.run(main())


@check(
    "static.peers",
    looks_at="PYSMC_PEERS, the peers that are known to speak SMC.",
    means="The discovery 'static' finds no peer, or every loop refuses to start.",
    remedy="Set PYSMC_PEERS to the numeric addresses of the peers (host, host:port or"
    " network), the same service at both ends. A peer that is listed but does not speak"
    " SMC gets bytes that it does not understand.",
)
def static_peers(machine: Machine) -> Finding:
    """Read the list of peers."""
    from pysmc.discovery.static import StaticPeers

    config = machine.config
    if "static" not in config.discovery:
        return skip("PYSMC_DISCOVERY does not have 'static'.")
    try:
        StaticPeers(config.peers)
    except ValueError as error:
        return fail(f"{error}.")
    if not config.peers:
        return warn("PYSMC_DISCOVERY has 'static', but PYSMC_PEERS is empty.")
    return ok(f"Listed: {', '.join(config.peers)}.")


@check(
    "tcp_option",
    looks_at="Whether the eBPF programs for the SMC option work for sockets of this"
    " process: a fresh one is asked, and a connection over loopback has to carry the"
    " option both ways. Which cgroups have the programs, as far as that can be seen.",
    means="Peers on other hosts are not recognised by the option, and so only if"
    " PYSMC_PEERS lists them; a kernel's SMC is not recognised at all.",
    remedy="As root: pysmc option attach (docs/howto/option.md); 'pysmc option status'"
    " tells more.",
)
def tcp_option(machine: Machine) -> Finding:
    """Try the option, and tell for which cgroups it is there."""
    trial = machine.try_option()
    cgroups = machine.option_cgroups()
    where = f"attached to {', '.join(cgroups)}" if cgroups else ""
    if trial.works:
        rest = f"; the programs are {where}" if where else ""
        return ok(f"It works for sockets of this process{rest}.")
    seen = f"{trial.reason} They are {where}." if where else trial.reason
    if trial.abi is not None:
        return fail(seen)
    if "tcp_option" in machine.config.discovery and "verbs" in machine.config.fabrics:
        return warn(seen)
    return skip(seen, tcp_option.remedy)


CHECKS = (cookies, mark, connection, static_peers, tcp_option)
