"""Where memory or descriptors run out: TCP with one clear reason, or an error.

Each case runs in a process of its own, which lacks something while the other end, in
this process or another, lacks nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pysmc
from pysmc.fabric import shm_arena
from tests.fabric.rawpeer import Child

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
KIB = 1024
CONFIG = pysmc.Config(
    rmbe_bytes=16 * KIB,
    sndbuf_bytes=16 * KIB,
    handshake_wait=3.0,
    confirm_link_server_wait=0.5,
    confirm_link_client_wait=1.2,
    decline_wait=0.3,
    llc_wait=0.5,
    discovery_wait=0.3,
)
PATIENCE = 15.0
MESSAGE = b"shortage" * 1000
REASONS = {
    *("LIMIT", "NO_MEMORY"),  # here
    *("MARK_LOST", "LINK_FAILED", "PEER_DECLINED"),  # there
}
"""What may be the reason of a connection that is TCP because of a shortage."""


class Shortage:
    """Takes all descriptors of this process but a few, and gives them back."""

    def __init__(self, spare: int) -> None:
        top = max(int(name) for name in os.listdir("/proc/self/fd")) + 30
        resource.setrlimit(resource.RLIMIT_NOFILE, (top, top))
        self._fillers: list[int] = []
        with contextlib.suppress(OSError):  # EMFILE
            while True:
                self._fillers.append(os.dup(0))
        for _ in range(spare):
            os.close(self._fillers.pop())

    def end(self) -> None:
        """Give them back."""
        while self._fillers:
            os.close(self._fillers.pop())


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection."""
    try:
        writer.write(await reader.readexactly(len(MESSAGE)))
        await writer.drain()
    except (OSError, asyncio.IncompleteReadError):
        return  # the other end gave up for want of something
    finally:
        writer.close()


async def ask(port: int) -> tuple[str, str]:
    """Have a message echoed; tell the mode and the reason, or the error."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError as exc:
        return "error", errno.errorcode.get(exc.errno or 0, type(exc).__name__)
    info = writer.get_extra_info("smc")
    try:
        writer.write(MESSAGE)
        assert await reader.readexactly(len(MESSAGE)) == MESSAGE
    except (OSError, asyncio.IncompleteReadError) as exc:
        return "error", type(exc).__name__
    finally:
        writer.close()
    return info.mode, info.reason.name if info.reason else ""


def run(main: Any) -> Any:
    """Run a coroutine on a loop of ours, with a deadline."""

    async def limited() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await main

    return pysmc.run(limited(), config=CONFIG)


def judge(outcome: tuple[str, str]) -> None:
    """Accept SMC-R, TCP with a reason of the table, and an error."""
    mode, why = outcome
    assert mode in {"smcr", "tcp", "error"}, outcome
    if mode == "tcp":
        assert why in REASONS, outcome
    else:
        assert mode == "smcr" or why, outcome


def rest(before: int) -> int:
    """Tell how many descriptors are left over."""
    return len(os.listdir("/proc/self/fd")) - before


# --- descriptors ---------------------------------------------------------------------


async def _starved_client(port: int, spare: int) -> list[Any]:
    before = len(os.listdir("/proc/self/fd"))
    shortage = Shortage(spare)
    begin = time.process_time()
    outcome = await ask(port)
    shortage.end()
    busy = time.process_time() - begin
    again = await ask(port)
    again = await ask(port) if again[0] != "smcr" else again
    return [outcome, again, busy, rest(before) < 20]


@pytest.mark.slow
def test_a_client_without_descriptors() -> None:
    async def serve_and_fork() -> list[list[Any]]:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        results = []
        for spare in range(21):
            child = Child(lambda: _fresh(_starved_client(port, spare)))  # noqa: B023
            results.append(await _result(child))
        server.close()
        return results

    results = pysmc.run(serve_and_fork(), config=CONFIG)
    for outcome, again, busy, is_clean in results:
        judge(outcome)
        assert again == ("smcr", ""), "with descriptors it is there at once"
        assert busy < 1.0, "it spins"
        assert is_clean
    assert results[0][0] == ("error", "EMFILE")
    assert results[20][0] == ("smcr", "")
    assert any(result[0][0] == "tcp" for result in results), results


def _fresh(main: Any) -> Any:
    """In a forked child: forget the parent's loop, and run something on a new one."""
    asyncio._set_running_loop(None)
    return run(main)


async def _result(child: Child) -> Any:
    """Wait for a child without keeping the loop from serving it."""
    await readable(child._reading)
    return child.result()


async def readable(descriptor: int) -> None:
    """Wait until something can be read."""
    loop = asyncio.get_running_loop()
    news = asyncio.Event()
    loop.add_reader(descriptor, news.set)
    await news.wait()
    loop.remove_reader(descriptor)


async def _starved_server(spare: int, line: socket.socket) -> list[Any]:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    before = len(os.listdir("/proc/self/fd"))
    shortage = Shortage(spare)
    begin = time.process_time()
    line.send(str(server.sockets[0].getsockname()[1]).encode())
    await readable(line.fileno())
    assert line.recv(10) == b"enough"
    shortage.end()
    busy = time.process_time() - begin
    await readable(line.fileno())
    assert line.recv(10) == b"done"
    server.close()
    return [busy, rest(before) < 20]


@pytest.mark.slow
def test_a_server_without_descriptors() -> None:
    modes = set()
    for spare in range(21):
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        far.setblocking(False)
        child = Child(lambda: run(_starved_server(spare, far)))  # noqa: B023
        far.close()
        near.settimeout(PATIENCE)
        port = int(near.recv(10))

        async def meet() -> tuple[Any, Any]:
            first = asyncio.create_task(ask(port))  # noqa: B023
            # Its verdict comes without the server, which has no descriptor for it.
            await asyncio.wait([first], timeout=1.0)
            near.send(b"enough")  # noqa: B023
            outcome = await first
            again = await ask(port)  # noqa: B023
            return outcome, again if again[0] == "smcr" else await ask(port)  # noqa: B023

        outcome, again = run(meet())
        near.send(b"done")
        busy, is_clean = child.result()
        near.close()
        judge(outcome)
        modes.add(outcome[0])
        assert again == ("smcr", ""), (spare, again)
        assert busy < 1.0, f"with {spare} descriptors it spins"
        assert is_clean
    assert {"smcr", "tcp"} <= modes


# --- memory --------------------------------------------------------------------------


def _small_files() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * KIB, 64 * KIB))


def _small_address_space() -> None:
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), used + (4 << 20)))


def _failing(code: int) -> Callable[[], None]:
    def fail() -> None:
        def full(*arguments: Any) -> None:
            raise OSError(code, os.strerror(code))

        module: Any = os
        module.posix_fallocate = full

    return fail


def _no_memfd() -> None:
    def forbidden(*arguments: Any) -> int:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    module: Any = os
    module.memfd_create = forbidden


async def _short(take_away: Callable[[], None], port: int) -> list[Any]:
    shm_arena.ARENA_BYTES = 8 << 20
    before = len(os.listdir("/proc/self/fd"))
    if port:
        take_away()
        return [await ask(port), await ask(port), rest(before) < 20]
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    take_away()
    outcomes = [await ask(port), await ask(port)]
    server.close()
    return [*outcomes, rest(before) < 20]


@pytest.mark.slow
@pytest.mark.parametrize("role", ["client", "both"])
@pytest.mark.parametrize(
    "take_away",
    [_small_files, _small_address_space, _failing(errno.ENOSPC), _failing(errno.ENOMEM),
     _no_memfd],
    ids=["RLIMIT_FSIZE", "RLIMIT_AS", "ENOSPC", "ENOMEM", "no memfd"],
)  # fmt: skip
def test_without_memory(take_away: Callable[[], None], role: str) -> None:
    async def serve_and_fork() -> list[Any]:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1] if role == "client" else 0
        result = await _result(Child(lambda: _fresh(_short(take_away, port))))
        server.close()
        return list(result)

    first, second, is_clean = pysmc.run(serve_and_fork(), config=CONFIG)
    for mode, why in (first, second):
        # With both ends in one process the peer may be the first to say so.
        names = {"NO_MEMORY", "LIMIT"} | (
            {"PEER_DECLINED"} if role == "both" else set()
        )
        assert mode == "tcp"
        assert why in names
    assert is_clean


# --- what stays after a death --------------------------------------------------------


def abstract_names() -> set[str]:
    """Tell the abstract Unix names of ours in this network namespace."""
    with open("/proc/net/unix", encoding="ascii", errors="replace") as file:
        lines = [line.split() for line in file]
    names = [words[-1] for words in lines if len(words) > 7]
    return {name for name in names if name.startswith("@pysmc")}


async def _until_killed(line: socket.socket) -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    assert await ask(port) == ("smcr", "")
    driver = asyncio.get_running_loop().driver  # type: ignore[attr-defined]
    own = (f"/{port}", f"-{port}", driver.devices[0].peer_id.hex())
    names = [name for name in abstract_names() if name.endswith(own)]
    line.send(" ".join(names).encode())
    await asyncio.Event().wait()


@pytest.mark.soak
@pytest.mark.slow
def test_nothing_stays_after_kill_9(long_run: Callable[..., Any]) -> None:
    before = set(os.listdir("/dev/shm"))
    names: set[str] = set()
    with long_run("kill-9-names", small=20, full=200) as run_of_them:
        for _ in run_of_them.seeds():
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            child = Child(lambda: run(_until_killed(far)))  # noqa: B023
            far.close()
            near.settimeout(PATIENCE)
            its_names = near.recv(1000).decode().split()
            assert len(its_names) >= 3, "beacons, their keepers and the endpoint"
            names.update(its_names)
            os.kill(child.pid, signal.SIGKILL)
            assert child.reap() == -signal.SIGKILL
            near.close()
            run_of_them.add(killed=1, names=len(its_names))
    assert not abstract_names() & names
    assert set(os.listdir("/dev/shm")) <= before


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount another /dev/shm")
def test_a_small_dev_shm_is_no_limit() -> None:
    program = """
import asyncio, os
os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 1 << 20 or exit(3)
import pysmc
from tests.fabric.test_shortage import CONFIG, ask, echo

async def main():
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    print(*await ask(port))
    server.close()

pysmc.run(main(), config=CONFIG)
"""
    script = 'mount -t tmpfs -o size=1m none /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "--mount", "sh", "-c", script, sys.executable, program]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "proto")))
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.split() == ["smcr"], done.stderr
