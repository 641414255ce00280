"""What TLS over SMC-R leaves behind: nothing, on any loop and any Python."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import warnings
from asyncio import sslproto
from pathlib import Path
from typing import Any

import construct
import pytest

from pysmc.aio.transport import SmcTransport
from tests.aio.pythons import need
from tests.aio.tls_kit import (
    WORLDS,
    World,
    pattern,
    raw_of,
    serving,
    story,
)

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(__file__).with_name("tls_program.py")


@pytest.fixture(params=WORLDS)
def world(request) -> World:
    return WORLDS[request.param]


def count_objects() -> dict[str, int]:
    """Count what each connection consists of."""
    gc.collect()
    kinds = (SmcTransport, sslproto.SSLProtocol, asyncio.StreamReader, asyncio.Task)
    found = [type(thing) for thing in gc.get_objects()]
    return {
        kind.__name__: sum(issubclass(one, kind) for one in found) for kind in kinds
    }


async def come_and_go(world: World, client: Any, server: Any, count: int) -> None:
    """Connect, say something, and end in one of four ways."""
    async with serving(world, server) as served:
        for number in range(count):
            here, there = await served.pair(client)
            here.writer.write(pattern(1000, number))
            assert await there.reader.readexactly(1000) == pattern(1000, number)
            (
                here.writer.close,
                there.writer.close,
                here.writer.transport.abort,
                raw_of(there).abort,
            )[number % 4]()
            for stream in (here, there):
                await story(stream.reader.read())
                stream.writer.close()
                await story(stream.writer.wait_closed())
            served.opened.clear()


@pytest.mark.slow
def test_many_connections(kit, authority, world) -> None:
    server, client = authority.server_context(), authority.client_context()
    rounds, count = (2, 100) if world.name == "pysmc" else (1, 40)

    async def scenario() -> None:
        await come_and_go(world, client, server, 8)
        before = kit.count_descriptors(), count_objects(), len(asyncio.all_tasks())
        await come_and_go(world, client, server, count)
        after = kit.count_descriptors(), count_objects(), len(asyncio.all_tasks())
        assert after == before

    for _ in range(rounds):
        kit.run(scenario, factory=world.factory)


@pytest.mark.slow
def test_handshakes_that_fail(kit, authority, world) -> None:
    server, client = authority.server_context("unknown"), authority.client_context()

    async def fail(served: Any) -> None:
        for number in range(60):
            if number % 2:
                told = await story(served.connect(client))
                assert "CERTIFICATE_VERIFY_FAILED" in told
            else:
                attempt = asyncio.ensure_future(served.connect(client))
                for _ in range(number):
                    await asyncio.sleep(0)
                attempt.cancel()
                await asyncio.wait([attempt])

    async def scenario() -> None:
        async with serving(world, server) as served:
            await fail(served)
            before = count_objects()
            await fail(served)
            assert count_objects() == before
            assert served.streams.empty()

    kit.run(scenario, factory=world.factory)


@pytest.mark.filterwarnings("always::ResourceWarning")
def test_what_nobody_closed_is_said(kit, authority, world) -> None:
    """And its descriptor is closed, which the kit looks after."""

    async def scenario() -> None:
        async with serving(world, authority.server_context()) as served:
            here, there = await served.pair(authority.client_context())
            raw_of(here).pause_reading()
            served.opened.clear()
            there.writer.transport.abort()
            del here, there
            gc.collect()
            await asyncio.sleep(0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kit.run(scenario, factory=world.factory)
        gc.collect()
    assert any("unclosed transport" in str(one.message) for one in caught)


# --- Other interpreters, and this one in its strict mode


def run_program(python: str, folder: Path, authority, *flags: str) -> list[str]:
    """Run the program with files that were made here; gives what it says."""
    authority.issue("server")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{ROOT}:{ROOT / 'proto'}",
        "PYTHONHASHSEED": "random",
    }
    files = [authority.root, authority.issue("server").path]
    done = subprocess.run(
        [python, *flags, "-W", "error", PROGRAM, *files],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    said: list[str] = json.loads(done.stdout)
    return said


def construct_alone(folder: Path) -> Path:
    """Link the one package that pysmc needs, and nothing that a Python might mix up."""
    (folder / "construct").symlink_to(Path(construct.__file__).parent)
    return folder


@pytest.mark.slow
def test_strict(authority, tmp_path) -> None:
    folder = construct_alone(tmp_path)
    said = run_program(sys.executable, folder, authority, "-X", "dev")
    once = [
        "a MB there and back",
        "Hostname mismatch, certificate is not valid for 'no.invalid'.",
        "b''",
        "b''",
        "start_tls",
    ]
    assert said[1:] == [*once, *once]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_other_pythons(authority, tmp_path, version) -> None:
    python = need(version)
    folder = construct_alone(tmp_path)
    said = run_program(python, folder, authority, "-X", "dev")
    assert said[0] == f"Python {version}"
    assert said == [said[0], *run_program(sys.executable, folder, authority)[1:]]
