"""Programs that nobody wrote for SMC: their sockets are the kernel's SMC by fmod_ret.

Debian's redis-server, redis-benchmark, nginx and curl run unchanged in a cgroup whose
TCP sockets are the kernel's SMC sockets (`smc_cgroup`); at the other end are well-known
libraries on pysmc's loop.
"""

# ruff: noqa: T201  # the figures of a scenario are in its output

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import select
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import pysmc
from pysmc.discovery.option.cgroup import own_cgroup
from tests.lab.kernel_smc import IPPROTO_SMC
from tests.lab.smc_cgroup import NoSmcError, SmcCgroup

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterator

SERVER, CLIENT = "10.0.0.1", "10.0.0.2"
MIB = 1 << 20
START_WAIT = 20.0
SIZES = (0, 1, 1000, 64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, MIB, 4 * MIB)
"""Of the files that a web server has."""
AT_ONCE = 8
"""Linux shakes hands with one client of a listener after the other, and we await an
Accept for six seconds: twenty of them were too many in a guest on a busy host."""
HTTP_WAIT = 100.0
"""Seconds for a request with its connection; for the latter aiohttp itself waits 30."""
NGINX = """
user root;
worker_processes 1;
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen {host}:{port};
        root {folder}/files;
    }}
}}
"""


def needed(program: str) -> str:
    """Find a program of the distribution."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    found = shutil.which(program, path=path)
    if found is None:
        pytest.skip(f"needs the program {program}")
    return found


def content(size: int) -> bytes:
    """Give what a file, or a value, of this size has in it."""
    word = hashlib.sha256(str(size).encode()).digest()
    return (word * (size // len(word) + 1))[:size]


def free_port() -> int:
    """Give a port at which nobody listens."""
    with socket.create_server((SERVER, 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for_listener(port: int, process: subprocess.Popen[str]) -> None:
    """Wait until the program listens, without connecting to it."""
    end = time.monotonic() + START_WAIT
    listens = re.compile(rf":{port:04X} \S+ 0A ")
    while not listens.search(Path("/proc/net/tcp").read_text(encoding="ascii")):
        assert process.poll() is None, f"it has ended with {process.returncode}"
        assert time.monotonic() < end, f"nobody listens on port {port}"
        select.select([], [], [], 0.05)


@pytest.fixture
def programs(kernel, option) -> Iterator[SmcCgroup]:
    """A cgroup in which programs speak the kernel's SMC."""
    with SmcCgroup(own_cgroup()) as cgroup:
        yield cgroup


def play(work: Coroutine[Any, Any, None]) -> None:
    """Run the end that is ours."""
    config = pysmc.Config(
        fabrics=("verbs",), discovery=("tcp_option",), ueids=("PYSMC.LAB",)
    )
    pysmc.run(work, config=config)


def assert_smcr(transport: Any) -> None:
    """Our end is on SMC-R."""
    info = transport.get_extra_info("smc")
    assert (info.mode, info.fabric) == ("smcr", "verbs"), info


def assert_kernel_is_on_smcr(kernel, at_least: int = 1) -> None:
    """So are all ends of the kernel, by its own account."""
    found = kernel.sockets()
    assert len(found) >= at_least, found
    assert {one.mode for one in found} == {"smcr"}, found


# Servers of theirs


@pytest.fixture
def redis_port(programs) -> int:
    """A redis-server, and its port."""
    port = free_port()
    words = [needed("redis-server"), "--bind", SERVER, "--port", str(port)]
    words += ["--save", "", "--appendonly", "no", "--protected-mode", "no"]
    process = programs.start(words, stdout=subprocess.DEVNULL)
    wait_for_listener(port, process)
    return port


@contextlib.asynccontextmanager
async def redis_client(port: int) -> AsyncIterator[Any]:
    """Connect redis-py, and see what carries it."""
    redis = pytest.importorskip("redis.asyncio", reason="needs redis-py: pip install")
    async with redis.Redis(host=SERVER, port=port, single_connection_client=True) as it:
        yield it


@pytest.mark.lab_long(seconds=180)
def test_redis_py_with_redis_server(kernel, redis_port) -> None:
    async def work() -> None:
        async with redis_client(redis_port) as client:
            assert await client.ping() is True
            assert_smcr(client.connection._writer.transport)
            assert_kernel_is_on_smcr(kernel)
            value = content(MIB)
            assert await client.set("big", value)
            assert hashlib.sha256(await client.get("big")).digest() == (
                hashlib.sha256(value).digest()
            )
            await pipelines(client)
            await news(client, redis_port)
            assert_kernel_is_on_smcr(kernel)

    play(work())
    kernel.wait_until_gone()


async def pipelines(client: Any) -> None:
    """Send a thousand commands before the first answer is read, twice."""
    async with client.pipeline(transaction=False) as pipe:
        for number in range(1000):
            pipe.set(f"key:{number}", content(number))
        assert await pipe.execute() == [True] * 1000
        for number in range(1000):
            pipe.get(f"key:{number}")
        assert await pipe.execute() == [content(number) for number in range(1000)]


async def news(client: Any, port: int) -> None:
    """Publish, and be told."""
    async with redis_client(port) as other, other.pubsub() as listening:
        await listening.subscribe("news")
        first = await listening.get_message(timeout=10)
        assert first["type"] == "subscribe"
        assert_smcr(listening.connection._writer.transport)
        for number in range(20):
            assert await client.publish("news", content(number)) == 1
        for number in range(20):
            message = await listening.get_message(timeout=10)
            assert message["data"] == content(number)


@pytest.fixture
def nginx_port(programs, tmp_path) -> int:
    """An nginx with files of every size, and its port."""
    port = free_port()
    (tmp_path / "files").mkdir()
    for size in SIZES:
        (tmp_path / "files" / str(size)).write_bytes(content(size))
    settings = tmp_path / "nginx.conf"
    settings.write_text(NGINX.format(folder=tmp_path, host=SERVER, port=port))
    process = programs.start([needed("nginx"), "-c", str(settings)])
    wait_for_listener(port, process)
    return port


@pytest.mark.lab_long(seconds=180)
def test_aiohttp_with_nginx(kernel, nginx_port) -> None:
    aiohttp = pytest.importorskip(
        "aiohttp", reason="needs aiohttp: pip install aiohttp"
    )
    base = f"http://{SERVER}:{nginx_port}"

    async def fetch(session: Any, size: int) -> Any:
        """Get a file; gives the transport that it came over."""
        async with session.get(f"{base}/{size}") as answer:
            # Of an answer without a body the session has taken the connection back.
            transport = answer.connection and answer.connection.transport
            assert answer.status == 200
            body = await answer.read()
        assert hashlib.sha256(body).digest() == hashlib.sha256(content(size)).digest()
        if transport is not None:
            assert_smcr(transport)
        return transport

    async def work() -> None:
        connector = aiohttp.TCPConnector(limit=AT_ONCE)
        patience = aiohttp.ClientTimeout(total=HTTP_WAIT)
        async with aiohttp.ClientSession(
            connector=connector, timeout=patience
        ) as session:
            kept = [await fetch(session, size) for size in SIZES]
            assert len({id(one) for one in kept if one is not None}) == 1
            assert_kernel_is_on_smcr(kernel)
            await asyncio.gather(
                *(fetch(session, MIB // 4 * 4) for _ in range(AT_ONCE))
            )
            assert_kernel_is_on_smcr(kernel, AT_ONCE)

    play(work())
    kernel.wait_until_gone()


# Clients of theirs


async def word_of(reader: asyncio.StreamReader) -> bytes:
    """Read a word that says its length first."""
    count = int((await reader.readline())[1:])
    return (await reader.readexactly(count + 2))[:-2]


async def answer_redis(reader: asyncio.StreamReader, writer: Any) -> None:
    """Be a redis that can do as much as redis-benchmark asks for."""
    store: dict[bytes, bytes] = {}
    assert_smcr(writer.transport)
    while head := await reader.readline():
        words = head.split()
        if head.startswith(b"*"):
            words = [await word_of(reader) for _ in range(int(head[1:]))]
        match words[0].upper(), *words[1:]:
            case b"PING", *_:
                writer.write(b"+PONG\r\n")
            case b"SET", key, value:
                store[key] = value
                writer.write(b"+OK\r\n")
            case b"GET", key:
                value = store.get(key, b"")
                writer.write(b"$%d\r\n%s\r\n" % (len(value), value))
            case _:
                writer.write(b"-ERR unknown command\r\n")
        await writer.drain()
    writer.close()


async def run_program(programs: SmcCgroup, words: list[str]) -> str:
    """Let a program of theirs run to its end; gives what it said."""
    process = programs.start(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    said, complaint = await asyncio.to_thread(process.communicate, timeout=100)
    assert process.returncode == 0, f"{process.returncode}: {said}{complaint}"
    return str(said)


@pytest.mark.lab_long(seconds=60)
def test_redis_benchmark_with_a_service_of_ours(kernel, programs) -> None:
    program = needed("redis-benchmark")
    modes: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: Any) -> None:
        modes.extend(one.mode for one in kernel.sockets())
        await answer_redis(reader, writer)

    async def work() -> None:
        async with await asyncio.start_server(serve, SERVER, 0) as server:
            port = server.sockets[0].getsockname()[1]
            words = [program, "-h", SERVER, "-p", str(port), "-t", "ping,set,get"]
            words += ["-n", "100", "-c", "4", "-d", "3000", "-q"]
            said = await run_program(programs, words)
            lines = [line.split("\r")[-1] for line in said.splitlines()]
            told = [line for line in lines if "requests per second" in line]
            print("\n".join(told))
            assert [line.split(":")[0] for line in told] == [
                "PING_INLINE", "PING_MBULK", "SET", "GET",
            ]  # fmt: skip

    play(work())
    # redis-benchmark first asks for the server's settings, then each test has four.
    assert len(modes) >= 4
    assert set(modes) == {"smcr"}
    kernel.wait_until_gone()


@pytest.mark.lab_long(seconds=120)
def test_curl_with_a_service_of_ours(kernel, programs, tmp_path) -> None:
    web = pytest.importorskip(
        "aiohttp.web", reason="needs aiohttp: pip install aiohttp"
    )
    program = needed("curl")
    (tmp_path / "sent").write_bytes(content(MIB + 1))

    async def give(request: Any) -> Any:
        assert_smcr(request.transport)
        assert_kernel_is_on_smcr(kernel)
        return web.Response(body=content(int(request.match_info["size"])))

    async def take(request: Any) -> Any:
        assert_smcr(request.transport)
        return web.Response(text=hashlib.sha256(await request.read()).hexdigest())

    async def work() -> None:
        application = web.Application(client_max_size=8 * MIB)
        application.router.add_get("/{size}", give)
        application.router.add_put("/sent", take)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, SERVER, 0)
        await site.start()
        base = f"http://{SERVER}:{runner.addresses[0][1]}"
        try:
            files = [f"-o{tmp_path / str(size)}" for size in SIZES]
            urls = [f"{base}/{size}" for size in SIZES]
            curl = [program, "--silent", "--show-error", "--fail", "--max-time", "80"]
            said = await run_program(programs, [*curl, *files, *urls])
            assert said == ""
            upload = ["--upload-file", str(tmp_path / "sent"), "-H", "Expect:"]
            said = await run_program(programs, [*curl, *upload, f"{base}/sent"])
            assert said == hashlib.sha256(content(MIB + 1)).hexdigest()
        finally:
            await runner.cleanup()

    play(work())
    for size in SIZES:
        assert (tmp_path / str(size)).read_bytes() == content(size)
    kernel.wait_until_gone()


# The way into the cgroup


@pytest.mark.lab_long(seconds=60)
def test_without_smc_no_socket_would_be_made(option) -> None:
    """What an administrator has to know: so the cgroup is not made at all."""
    modprobe = Path("/proc/sys/kernel/modprobe")
    loads = modprobe.read_text(encoding="utf-8")
    subprocess.run(["modprobe", "-r", "smc_diag", "smc"], check=True)
    modprobe.write_text("/bin/false", encoding="utf-8")
    cgroup = SmcCgroup(own_cgroup())
    try:
        with pytest.raises(NoSmcError, match="IPPROTO_SMC"), cgroup:
            pass
        assert not cgroup.folder.exists()
        cgroup.attach()
        ask = "import socket; socket.socket()"
        inside = cgroup.start(["python3", "-S", "-c", ask], stderr=subprocess.PIPE)
        assert "Protocol not supported" in inside.communicate(timeout=30)[1]
        socket.socket().close()
    finally:
        cgroup.close()
        modprobe.write_text(loads, encoding="utf-8")


@pytest.mark.lab_long(seconds=60)
def test_only_tcp_of_the_cgroup_is_changed(programs) -> None:
    ask = (
        "import socket as s\n"
        "for words in (2, 1), (10, 1), (2, 1, 6), (2, 2), (1, 1), (2, 1, 262):\n"
        "    print(s.socket(*words).getsockopt(1, 38))\n"
    )
    words = ["python3", "-S", "-c", ask]
    inside = programs.start(words, stdout=subprocess.PIPE).communicate(timeout=30)[0]
    outside = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    smc = str(IPPROTO_SMC)
    assert inside.split() == [smc, smc, smc, "17", "0", "262"]
    assert outside.split() == ["6", "6", "6", "17", "0", "262"]
