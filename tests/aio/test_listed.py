"""Peers of the static list get an answer in CLC, whatever is missing here."""

from __future__ import annotations

import asyncio
import errno
import threading
from typing import Any, Self

import pytest

import pysmc
from pysmc.aio import devices as devices_module
from pysmc.config import Config
from pysmc.errors import FabricError

HOST = "127.0.0.1"
LISTED: dict[str, Any] = {"discovery": ("static",), "peers": (HOST,)}


class Served:
    """A server on a loop of its own, in a thread of its own."""

    def __init__(self, config: Config) -> None:
        self.seen: list[bytes] = []
        self.infos: list[Any] = []
        self._config = config
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._done: asyncio.Event | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._done is not None
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(20)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        with asyncio.Runner(
            loop_factory=lambda: pysmc.new_event_loop(self._config)
        ) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()
        server = await asyncio.start_server(self._echo, HOST, 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await self._done.wait()

    async def _echo(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.infos.append(writer.get_extra_info("smc"))
        while data := await reader.read(100):
            self.seen.append(data)
            writer.write(data)
        writer.close()
        await writer.wait_closed()


async def echo(port: int) -> Any:
    """Send a word, get it back, and give what the connection says of itself."""
    reader, writer = await asyncio.open_connection(HOST, port)
    info = writer.get_extra_info("smc")
    writer.write(b"word")
    assert await reader.readexactly(4) == b"word"
    writer.close()
    await writer.wait_closed()
    return info


def run(work: Any, config: Config) -> Any:
    with asyncio.Runner(loop_factory=lambda: pysmc.new_event_loop(config)) as runner:
        return runner.run(asyncio.wait_for(work, 20))


@pytest.mark.parametrize(
    ("server", "client", "names"),
    [
        ({}, {}, (None, None)),
        ({"fabrics": ()}, {}, ("PEER_DECLINED", "DISABLED")),
        ({}, {"fabrics": ()}, ("DISABLED", "PEER_DECLINED")),
        ({"fabrics": ("verbs",)}, {}, ("PEER_DECLINED", "NO_DEVICE")),
        ({}, {"fabrics": ("verbs",)}, ("NO_DEVICE", "PEER_DECLINED")),
    ],
)
def test_no_clc_byte_reaches_the_application(
    server: dict[str, Any], client: dict[str, Any], names: tuple[str | None, ...]
) -> None:
    with Served(Config(**LISTED, **server)) as served:
        info = run(echo(served.port), Config(**LISTED, **client))
    assert served.seen == [b"word"]
    (there,) = served.infos
    assert tuple(i.reason and i.reason.name for i in (info, there)) == names


def test_at_its_limit_a_server_declines() -> None:
    async def at_once(port: int) -> list[Any]:
        return list(await asyncio.gather(*(echo(port) for _ in range(2))))

    with Served(Config(**LISTED, max_handshakes=1)) as served:
        infos = run(at_once(served.port), Config(**LISTED))
    assert served.seen == [b"word"] * 2
    assert {info.mode for info in infos} <= {"smcr", "tcp"}


def test_a_passing_lack_of_descriptors_is_not_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = devices_module.open_device
    failures = [FabricError("open", "NO_MEMORY", "EMFILE"), OSError(errno.EMFILE, "x")]

    def scarce(*args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args, **options)

    async def three(port: int) -> list[str]:
        return [
            str(info.reason and info.reason.name)
            for info in [await echo(port) for _ in range(3)]
        ]

    with Served(Config()) as served:
        monkeypatch.setattr(devices_module, "open_device", scarce)
        assert run(three(served.port), Config()) == ["LIMIT", "LIMIT", "None"]


def test_a_listed_peer_gets_a_decline_while_descriptors_are_lacking(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = devices_module.open_device
    failures = [OSError(errno.EMFILE, "no descriptors")]

    def scarce(*args: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args, **options)

    async def two(port: int) -> list[Any]:
        return [await echo(port) for _ in range(2)]

    with Served(Config(**LISTED)) as served:
        monkeypatch.setattr(devices_module, "open_device", scarce)
        infos = run(two(served.port), Config(**LISTED))
    assert served.seen == [b"word"] * 2
    names = [info.reason and info.reason.name for info in (*infos, *served.infos)]
    assert names == ["LIMIT", None, "PEER_DECLINED", None]
