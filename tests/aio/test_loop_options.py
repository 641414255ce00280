"""Every option of create_connection, create_server and connect_accepted_socket.

What an option does is shown over SMC-R; what the calls refuse, and in which words, is
compared with the stock loop's answer to the same call.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import ssl
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest

import pysmc
from pysmc.config import Config
from tests.twins.test_registry import VERSIONS, interpreters

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parents[2]


def modes(*protocols) -> set[str]:
    return {protocol.info_when_made.mode for protocol in protocols}


class Pairs:
    """Makes a server's protocols, and waits for them."""

    def __init__(self, kit) -> None:
        self.kit = kit
        self.served: list[Any] = []

    def make(self) -> Any:
        self.served.append(self.kit.Recorder())
        return self.served[-1]

    async def connect(self, *args, **options) -> Any:
        """Connect, exchange a byte each way, see SMC-R at both ends, and close."""
        loop = asyncio.get_running_loop()
        before = len(self.served)
        transport, client = await loop.create_connection(
            self.kit.Recorder, *args, **options
        )
        transport.write(b"x")
        while len(self.served) == before:
            await asyncio.sleep(0)
        server = self.served[-1]
        await server.until_bytes(1)
        server.transport.write(b"y")
        await client.until_bytes(1)
        assert modes(client, server) == {"smcr"}
        names = [transport.get_extra_info(n) for n in ("sockname", "peername")]
        transport.close()
        await client.until_call("lost")
        await server.until_call("lost")
        return names


@pytest.fixture
def pairs(kit) -> Pairs:
    return Pairs(kit)


def port_of(server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


def both_families(loop, hosts: list[str]) -> None:
    """Let "localhost" be these addresses, in this order, on every machine."""
    ask = loop.getaddrinfo

    async def getaddrinfo(host, port, **options) -> Any:
        if host != "localhost":
            return await ask(host, port, **options)
        family = options.get("family", 0)
        found = []
        for one in hosts:
            options["family"] = socket.AF_INET6 if ":" in one else socket.AF_INET
            if family in {0, options["family"]}:
                found += await ask(one, port, **options)
        return found

    loop.getaddrinfo = getaddrinfo


# --- create_connection: which address


@pytest.mark.parametrize("served", [HOST, "::1"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"happy_eyeballs_delay": 0.01},
        {"happy_eyeballs_delay": 5},
        {"happy_eyeballs_delay": 0.01, "interleave": 2},
        {"interleave": 1},
        {"interleave": 2},
    ],
    ids=str,
)
def test_one_of_two_addresses_is_refused(kit, pairs, served, options) -> None:
    async def scenario() -> None:
        both_families(asyncio.get_running_loop(), ["::1", HOST])
        async with kit.serving(pairs.make, host=served) as port:
            names = await pairs.connect("localhost", port, **options)
            assert names[1][:2] == (served, port)

    kit.run(scenario)


@pytest.mark.parametrize("delay", [0, 0.001])
def test_two_addresses_race_and_the_loser_leaves_nothing(kit, pairs, delay) -> None:
    """The descriptors are counted afterwards, and so are tasks."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        both_families(loop, ["::1", HOST])
        server = await serve_both(loop, pairs.make)
        for _ in range(10):
            await pairs.connect(
                "localhost", port_of(server), happy_eyeballs_delay=delay
            )
        server.close()
        await server.wait_closed()
        assert [one for one in pairs.served if one.data != b"x"] == []

    kit.run(scenario)


async def serve_both(loop, make, **options) -> Any:
    """Listen at one port of both families; somebody may take it in between."""
    for _ in range(10):
        server = await loop.create_server(make, HOST, 0)
        port = port_of(server)
        server.close()
        await server.wait_closed()
        try:
            return await loop.create_server(make, [HOST, "::1"], port, **options)
        except OSError:
            continue
    raise AssertionError


def test_family_proto_and_flags(kit, pairs) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        both_families(loop, [HOST, "::1"])
        server = await serve_both(loop, pairs.make)
        port = port_of(server)
        names = await pairs.connect("localhost", port, family=socket.AF_INET6)
        assert names[1][:2] == ("::1", port)
        names = await pairs.connect("localhost", port, proto=socket.IPPROTO_TCP)
        assert names[1] == (HOST, port)
        await pairs.connect(HOST, port, flags=socket.AI_NUMERICHOST)
        with pytest.raises(socket.gaierror):
            await pairs.connect("no-number", port, flags=socket.AI_NUMERICHOST)
        server.close()
        await server.wait_closed()

    kit.run(scenario)


def test_local_addr(kit, pairs) -> None:
    async def scenario() -> None:
        async with kit.serving(pairs.make) as port:
            names = await pairs.connect(HOST, port, local_addr=("127.0.0.2", 0))
            assert names[0][0] == "127.0.0.2"
            with socket.socket() as sock:
                sock.bind((HOST, 0))
                free = sock.getsockname()[1]
            names = await pairs.connect(HOST, port, local_addr=(HOST, free))
            assert names[0] == (HOST, free)

    kit.run(scenario)


def test_sockets_of_the_program(kit, pairs) -> None:
    """Connected by the loop's own call; and a listening one."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, 0))
        async with kit.serving(pairs.make, host=None, port=None, sock=listener) as port:
            sock = socket.socket()
            sock.setblocking(False)
            await loop.sock_connect(sock, (HOST, port))
            own = sock.getsockname()
            names = await pairs.connect(sock=sock)
            assert names == [own, (HOST, port)]

    kit.run(scenario)


# --- create_server


@pytest.mark.parametrize("host", [HOST, "::1", "localhost", None, ""])
def test_hosts(kit, pairs, host) -> None:
    """None and "" are every address; with port 0 each family has a port of its own."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        both_families(loop, [HOST])
        server = await loop.create_server(pairs.make, host, 0)
        assert len(server.sockets) == (1 if host else 2)
        for listener in server.sockets:
            there = HOST if listener.family == socket.AF_INET else "::1"
            await pairs.connect(there, listener.getsockname()[1])
        server.close()
        await server.wait_closed()

    kit.run(scenario)


def test_several_hosts(kit, pairs) -> None:
    async def scenario() -> None:
        server = await serve_both(asyncio.get_running_loop(), pairs.make)
        assert len(server.sockets) == 2
        for host in (HOST, "::1"):
            await pairs.connect(host, port_of(server))
        server.close()
        await server.wait_closed()

    kit.run(scenario)


def test_family_and_flags_of_a_server(kit, pairs) -> None:
    async def scenario() -> None:
        options = {"family": socket.AF_INET6, "flags": socket.AI_NUMERICHOST}
        async with kit.serving(pairs.make, host="::1", **options) as port:
            names = await pairs.connect("::1", port)
            assert names[1][:2] == ("::1", port)

    kit.run(scenario)


@pytest.mark.parametrize(("backlog", "clients"), [(1, 2), (100, 20)])
def test_backlog(kit, pairs, backlog, clients) -> None:
    """As many at once as may wait; beyond that SYN cookies forget the mark."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        async with kit.serving(pairs.make, backlog=backlog) as port:
            made = await asyncio.gather(
                *(
                    loop.create_connection(kit.Recorder, HOST, port)
                    for _ in range(clients)
                )
            )
            for _, client in made:
                assert client.info_when_made.reason is None
                client.transport.close()
                await client.until_call("lost")
            for server in pairs.served:
                await server.until_call("lost")
            assert len(pairs.served) == clients

    kit.run(scenario, config=Config(discovery_wait=20))


def test_reuse_port(kit, pairs) -> None:
    """Two servers at one port; the kernel chooses, and both move what they get."""

    async def scenario() -> None:
        others = Pairs(kit)
        async with kit.serving(pairs.make, reuse_port=True) as port:
            async with kit.serving(others.make, port=port, reuse_port=True):
                loop = asyncio.get_running_loop()
                while not (pairs.served and others.served):
                    _, client = await loop.create_connection(kit.Recorder, HOST, port)
                    assert modes(client) == {"smcr"}
                    client.transport.close()
                    await client.until_call("lost")
                for server in (*pairs.served, *others.served):
                    await server.until_call("lost")
                    assert modes(server) == {"smcr"}
                pairs.served.clear()
            for _ in range(5):
                await pairs.connect(HOST, port)

    kit.run(scenario)


@pytest.mark.parametrize("reuse", [None, True, False])
def test_reuse_address(kit, pairs, reuse) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(pairs.make, HOST, 0, reuse_address=reuse)
        option = server.sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert bool(option) is (reuse is not False)
        await pairs.connect(HOST, port_of(server))
        server.close()
        await server.wait_closed()

    kit.run(scenario)


def test_start_serving_later(kit, pairs) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(pairs.make, HOST, 0, start_serving=False)
        port = port_of(server)
        assert not server.is_serving()
        with pytest.raises(ConnectionRefusedError):
            await loop.create_connection(kit.Recorder, HOST, port)
        await server.start_serving()
        await server.start_serving()  # again: nothing
        assert server.is_serving()
        await pairs.connect(HOST, port)
        forever = loop.create_task(server.serve_forever())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="already being awaited"):
            await server.serve_forever()
        await pairs.connect(HOST, port)
        forever.cancel()
        with pytest.raises(asyncio.CancelledError):
            await forever
        assert not server.is_serving()
        assert server.sockets == ()
        with pytest.raises(ConnectionRefusedError):
            await loop.create_connection(kit.Recorder, HOST, port)
        with pytest.raises(RuntimeError, match="is closed"):
            await server.serve_forever()

    kit.run(scenario)


def test_a_server_as_a_context(kit, pairs) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(pairs.make, HOST, 0)
        assert server.get_loop() is loop
        async with server as same:
            assert same is server
            await pairs.connect(HOST, port_of(server))
            name = server.sockets[0].getsockname()
            assert name == (HOST, port_of(server))
        assert server.sockets == ()
        assert not server.is_serving()
        server.close()
        await server.wait_closed()

    kit.run(scenario)


def test_a_server_that_is_closed_keeps_its_connections(kit, pairs) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(pairs.make, HOST, 0)
        _, client = await loop.create_connection(kit.Recorder, HOST, port_of(server))
        while not (pairs.served and pairs.served[0].transport):
            await asyncio.sleep(0)
        server.close()
        client.transport.write(b"still")
        await pairs.served[0].until_bytes(5)
        client.transport.close()
        await pairs.served[0].until_call("lost")
        await client.until_call("lost")
        await server.wait_closed()
        assert modes(client, *pairs.served) == {"smcr"}

    kit.run(scenario)


# --- connect_accepted_socket


@pytest.mark.parametrize("how", ["sock_accept", "accept"])
def test_connect_accepted_socket(kit, how) -> None:
    """From a listener of the program that a server of ours announces."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        listener = socket.create_server((HOST, 0))
        listener.setblocking(False)
        server = await loop.create_server(kit.Recorder, sock=listener)
        loop.remove_reader(listener.fileno())
        connecting = loop.create_task(
            loop.create_connection(kit.Recorder, *listener.getsockname())
        )
        if how == "sock_accept":
            conn, _ = await loop.sock_accept(listener)
        else:
            conn = await accept(listener)
        _, served = await loop.connect_accepted_socket(kit.Recorder, conn)
        _, client = await connecting
        assert modes(client, served) == {"smcr"}
        client.transport.close()
        await client.until_call("lost")
        await served.until_call("lost")
        server.close()
        await server.wait_closed()

    async def accept(listener) -> socket.socket:
        while True:
            try:
                conn: socket.socket = listener.accept()[0]
            except BlockingIOError:
                await asyncio.sleep(0)
            else:
                return conn

    kit.run(scenario)


def test_a_listener_that_nobody_announced_accepts_tcp(kit) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server((HOST, 0)) as listener:
            listener.setblocking(False)
            connecting = loop.create_task(
                loop.create_connection(kit.Recorder, *listener.getsockname())
            )
            conn, _ = await loop.sock_accept(listener)
            _, served = await loop.connect_accepted_socket(kit.Recorder, conn)
            _, client = await connecting
            assert modes(client, served) == {"tcp"}
            client.transport.close()
            await client.until_call("lost")
            await served.until_call("lost")

    kit.run(scenario)


# --- what is refused, in the stock loop's words


def udp() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


BAD_CONNECTIONS: dict[str, Any] = {
    "nothing": lambda: ((), {}),
    "host and sock": lambda: ((HOST, 1), {"sock": socket.socket()}),
    "datagram": lambda: ((), {"sock": udp()}),
    "hostname without ssl": lambda: ((HOST, 1), {"server_hostname": "x"}),
    "hostname missing": lambda: ((), {"sock": socket.socket(), "ssl": True}),
    "handshake timeout": lambda: ((HOST, 1), {"ssl_handshake_timeout": 1}),
    "shutdown timeout": lambda: ((HOST, 1), {"ssl_shutdown_timeout": 1}),
    "no ssl context": lambda: ((HOST, "port"), {"ssl": object()}),
    "name": lambda: (("no-number", 1), {"flags": socket.AI_NUMERICHOST}),
    "port": lambda: ((HOST, "no-service"), {}),
    "port too big": lambda: ((HOST, 70000), {}),
    "port of a wrong type": lambda: ((HOST, 1.5), {}),
    "family": lambda: ((HOST, 1), {"family": socket.AF_INET6}),
    "unknown option": lambda: ((HOST, 1), {"no_such_option": 1}),
    "local address": lambda: ((HOST, 1), {"local_addr": ("203.0.113.1", 0)}),
    "local family": lambda: ((HOST, 1), {"local_addr": ("::1", 0)}),
    "local port alone": lambda: ((HOST, 1), {"local_addr": (1,)}),
    "refused": lambda: ((HOST, 1), {}),
    "refused by both": lambda: (("localhost", 1), {"interleave": 1}),
}
BAD_SERVERS: dict[str, Any] = {
    "nothing": lambda: ((), {}),
    "host and sock": lambda: ((HOST, 0), {"sock": socket.socket()}),
    "datagram": lambda: ((), {"sock": udp()}),
    "ssl is a bool": lambda: ((HOST, 0), {"ssl": True}),
    "handshake timeout": lambda: ((HOST, 0), {"ssl_handshake_timeout": 1}),
    "shutdown timeout": lambda: ((HOST, 0), {"ssl_shutdown_timeout": 1}),
    "address": lambda: (("203.0.113.1", 0), {}),
    "several": lambda: (([HOST, "203.0.113.1"], 0), {}),
    "name": lambda: (("no-number", 0), {"flags": socket.AI_NUMERICHOST}),
    "port": lambda: ((HOST, "no-service"), {}),
    "backlog": lambda: ((HOST, 0), {"backlog": "many"}),
    "unknown option": lambda: ((HOST, 0), {"no_such_option": 1}),
    "closed socket": lambda: ((), {"sock": closed()}),
}
BAD_ACCEPTS: dict[str, Any] = {
    "datagram": lambda: ((udp(),), {}),
    "handshake timeout": lambda: ((socket.socket(),), {"ssl_handshake_timeout": 1}),
    "shutdown timeout": lambda: ((socket.socket(),), {"ssl_shutdown_timeout": 1}),
    "client context": lambda: ((socket.socket(),), {"ssl": object()}),
}


def closed() -> socket.socket:
    sock = socket.socket()
    sock.close()
    return sock


def refusal(loop, call: str, make) -> tuple[str, str]:
    """Type and text of what a call of a loop raises; its sockets are closed."""
    args, options = make()
    sockets = [a for a in (*args, *options.values()) if isinstance(a, socket.socket)]
    try:
        loop.run_until_complete(getattr(loop, call)(asyncio.Protocol, *args, **options))
    except Exception as error:  # noqa: BLE001  # whatever it is, it is compared
        text = str(error)
        for sock in sockets:
            if sock.fileno() >= 0:
                text = text.replace(f"fd={sock.fileno()}", "fd")
                text = text.replace(str(sock.getsockname()), "name")
        return type(error).__name__, text.replace(type(loop).__name__, "Loop")
    finally:
        for sock in sockets:
            sock.close()
    return "nothing", ""


def refusals(factory, call: str, make) -> tuple[str, str]:
    loop = factory()
    loop.set_exception_handler(lambda _, context: None)
    with warnings.catch_warnings():
        # The stock loop forgets sockets of a server that cannot listen.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            return refusal(loop, call, make)
        finally:
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()
            gc.collect()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        *(("create_connection", name) for name in BAD_CONNECTIONS),
        *(("create_server", name) for name in BAD_SERVERS),
        *(("connect_accepted_socket", name) for name in BAD_ACCEPTS),
    ],
)
def test_bad_arguments_are_refused_in_the_same_words(call, name) -> None:
    table = {
        "create_connection": BAD_CONNECTIONS,
        "create_server": BAD_SERVERS,
        "connect_accepted_socket": BAD_ACCEPTS,
    }[call]
    stock = refusals(asyncio.SelectorEventLoop, call, table[name])
    ours = refusals(lambda: pysmc.new_event_loop(Config()), call, table[name])
    assert stock[0] != "nothing", "the stock loop takes it: no bad argument"
    assert ours == stock


# --- what only some Pythons have

CHILD = """
import asyncio, json, socket, sys
import pysmc
from pysmc.config import Config

HOST = "127.0.0.1"
answers = {}

async def linger(reader, writer):
    modes.add(writer.get_extra_info("smc").mode)
    try:
        if await reader.read(1):
            arrived.set()
            await reader.read()
    finally:
        writer.close()

async def all_errors():
    loop = asyncio.get_running_loop()
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port = sock.getsockname()[1]
        try:
            await loop.create_connection(
                asyncio.Protocol, sock.getsockname()[0], port, all_errors=True)
        except ExceptionGroup as group:
            return [type(error).__name__ for error in group.exceptions]

async def keep_alive():
    server = await asyncio.start_server(linger, HOST, 0, keep_alive=True)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    modes.add(writer.get_extra_info("smc").mode)
    option = server.sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    writer.close()
    await writer.wait_closed()
    server.close()
    await server.wait_closed()
    return bool(option)

async def end_clients(how):
    global arrived
    arrived = asyncio.Event()
    server = await asyncio.start_server(linger, HOST, 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    modes.add(writer.get_extra_info("smc").mode)
    writer.write(b"x")
    async with asyncio.timeout(10):
        await arrived.wait()
    server.close()
    getattr(server, how)()
    async with asyncio.timeout(10):
        await server.wait_closed()
        try:
            said = (await reader.read()).decode()
        except ConnectionResetError:
            said = "reset"
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionResetError:
        pass
    return said

for name, program in {
    "all_errors": all_errors, "keep_alive": keep_alive,
    "close_clients": lambda: end_clients("close_clients"),
    "abort_clients": lambda: end_clients("abort_clients"),
}.items():
    if name not in sys.argv[2:]:
        continue
    modes = set()
    config = Config(discovery_wait=20)
    factory = (lambda: pysmc.new_event_loop(config)) if sys.argv[1] == "smcr" \\
        else asyncio.SelectorEventLoop
    if sys.argv[1] != "smcr":
        asyncio.StreamWriter.get_extra_info = (
            lambda self, name, default=None: type("Info", (), {"mode": "tcp"}))
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.get_loop().slow_callback_duration = 60  # a busy machine is no fault
        answers[name] = [runner.run(program()), sorted(modes)]
print(json.dumps(answers))
"""

ONLY_THERE = {
    "3.12": ("all_errors",),
    "3.13": ("all_errors", "keep_alive", "close_clients", "abort_clients"),
}


@pytest.mark.slow
@pytest.mark.parametrize("version", [v for v in VERSIONS if v in ONLY_THERE])
def test_options_of_later_pythons(version, tmp_path) -> None:
    """As over TCP on the same Python, but for the mode."""
    import construct

    program = interpreters().get(version)
    if program is None:
        pytest.skip(f"needs python{version}: install it, or put it in PATH")
    (tmp_path / "construct").symlink_to(Path(construct.__file__).parent)
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "proto")))
    answers = []
    for mode in ("smcr", "tcp"):
        done = subprocess.run(
            [program, "-X", "dev", "-W", "error", "-c", CHILD, mode,
             *ONLY_THERE[version]],
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True, text=True, check=False, timeout=50,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        answers.append(json.loads(done.stdout))
    over_smc, over_tcp = answers
    assert over_smc.keys() == set(ONLY_THERE[version])
    for name, (said, found) in over_smc.items():
        assert said == over_tcp[name][0], name
        assert found == ([] if name == "all_errors" else ["smcr"])
    assert over_smc["all_errors"][0] == ["ConnectionRefusedError"]
