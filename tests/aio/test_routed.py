"""Connections over a fabric whose devices are found by the route, in one loop.

The ports are made up, and what is opened for them is the simulated fabric's.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.aio.driver import Driver
from pysmc.aio.loop import Loop
from pysmc.config import Config
from pysmc.errors import FabricUnavailable
from pysmc.fabric import open_device
from pysmc.fabric.base import Status
from pysmc.fabric.sim_device import SimDevice
from pysmc.fabric.verbs_ports import RdmaPort
from pysmc.testing.loops import new_sim_network

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from pysmc.fabric.base import Device
    from pysmc.fabric.sim import SimNetwork

HOST = "127.0.0.1"
CONFIG = Config(
    fabrics=("verbs",), discovery=("static",), peers=("127.0.0.0/8",), ueids=("LAN",)
)


class Ports:
    """Finds a port for every connection, unless it is told not to."""

    missing = ""

    def __init__(self) -> None:
        self.problem: dict[bytes, str] = {}
        self.netdev = "va"
        self.asked: list[tuple[bytes, bytes, int]] = []

    def check(self) -> None:
        if self.missing:
            raise FabricUnavailable("open verbs", "UNAVAILABLE", self.missing)

    def find(self, local: bytes, peer: bytes, interface: int = 0) -> RdmaPort:
        assert len(local) == len(peer)
        self.asked.append((local, peer, interface))
        if local in self.problem:
            raise FabricUnavailable("open verbs", "UNAVAILABLE", self.problem[local])
        return RdmaPort(
            device=f"rxe{local[-1]}",
            port=1,
            gid_index=1,
            gid=(bytes(10) + b"\xff\xff" + local)[-16:],
            gid_type="RoCE v2",
            netdev=self.netdev,
            mac=bytes(5) + local[-1:],
            state="ACTIVE",
            mtu_code=3,
        )

    def close(self) -> None:
        """Nothing was opened."""


class PortDevice(SimDevice):
    """One of several devices of a process, which all have its peer ID."""

    def __init__(self, network: SimNetwork, number: bytes) -> None:
        super().__init__(network, number)
        self._number = number

    def close(self) -> None:
        self.peer_id = self._number  # as the network knows it
        super().close()


class RoutedLoop(Loop):
    """A loop whose RoCE ports are simulated devices."""

    def _make_driver(self) -> Driver:
        self.network = new_sim_network()
        self.ports = Ports()
        self.opened: list[Any] = []
        return Driver(
            self,
            self.config,
            self._watch_device,
            self._open_port,
            unwatch=self._unwatch_device,
            finder=lambda name, config: self.ports if name == "verbs" else None,
        )

    def _open_port(self, name: str, *, peer_id: bytes, **options: Any) -> Any:
        if name == "shm":
            return open_device(name, peer_id=peer_id, **options)
        port: RdmaPort = options["port"]
        number = bytes((len(self.opened),)) + peer_id[1:]
        device = self.network.device(number, PortDevice)
        device.fabric, device.gid, device.mac = name, port.gid, port.mac
        device.peer_id = peer_id
        self.opened.append(device)
        return device


class Pair:
    """Makes connections from any address of this host to a server of the loop."""

    def __init__(self, loop: RoutedLoop) -> None:
        self.loop = loop
        self.accepted: asyncio.Queue[Any] = asyncio.Queue()

    async def connect(
        self, source: str = "127.0.0.2", to: str = HOST
    ) -> tuple[Any, Any]:
        reader, writer = await asyncio.open_connection(
            to, self.port, local_addr=(source, 0)
        )
        there = await self.accepted.get()
        return (reader, writer), there

    async def infos(self, *addresses: str) -> tuple[Any, Any]:
        """Connect, exchange a word, close; give what each end knows of it."""
        here, there = await self.connect(*addresses)
        for (_, writer), (reader, _) in ((here, there), (there, here)):
            writer.write(b"word")
            assert await reader.readexactly(4) == b"word"
        for _, writer in (here, there):
            writer.close()
            await writer.wait_closed()
        return tuple(writer.get_extra_info("smc") for _, writer in (here, there))


def play(
    scenario: Callable[[Pair], Coroutine[Any, Any, None]],
    config: Config = CONFIG,
    host: str = HOST,
) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, RoutedLoop)
        pair = Pair(loop)

        async def serve(*streams: Any) -> None:
            await pair.accepted.put(streams)

        server = await asyncio.start_server(serve, host, 0)
        pair.port = server.sockets[0].getsockname()[1]
        await asyncio.wait_for(scenario(pair), 20)
        server.close()
        await server.wait_closed()

    with asyncio.Runner(loop_factory=lambda: RoutedLoop(config)) as runner:
        runner.run(run())


def gid(last: int) -> str:
    return f"::ffff:127.0.0.{last}"


def devices(loop: RoutedLoop) -> list[str]:
    return list(loop.driver._devices.by_name)


def test_each_connection_has_the_port_of_its_own_route() -> None:
    async def scenario(pair: Pair) -> None:
        here, there = await pair.infos()
        assert (here.mode, here.fabric, here.eid) == ("smcr", "verbs", "LAN")
        assert (here.local_gid, here.peer_gid) == (
            "::ffff:127.0.0.2",
            "::ffff:127.0.0.1",
        )
        assert devices(pair.loop) == ["verbs:rxe1:1:1", "verbs:rxe2:1:1"]
        again, _ = await pair.infos()
        assert again.link_group == here.link_group
        other, _ = await pair.infos("127.0.0.3")
        assert other.mode == "smcr"
        assert other.link_group not in {here.link_group, there.link_group}
        assert len(pair.loop.opened) == 3

    play(scenario)


@pytest.mark.parametrize(
    ("listen", "to", "source"),
    [
        ("0.0.0.0", "127.0.0.1", "127.0.0.2"),
        ("::", "127.0.0.1", "127.0.0.2"),
        ("::", "::1", "::1"),
        ("::1", "::1", "::1"),
    ],
)
def test_the_list_counts_whatever_the_listener_is_bound_to(
    listen: str, to: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, peers=("127.0.0.0/8", "[::1]"))

    async def scenario(pair: Pair) -> None:
        here, there = await pair.infos(source, to)
        assert (here.mode, there.mode) == ("smcr", "smcr")
        ours, theirs = (ipaddress.ip_address(each).packed for each in (source, to))
        assert set(pair.loop.ports.asked) == {(ours, theirs, 0), (theirs, ours, 0)}

    def dual_stack(*args: Any, **options: Any) -> Any:
        options["sock"] = socket.create_server(
            (listen, 0), family=socket.AF_INET6, dualstack_ipv6=True
        )
        return real(args[0], **options)

    real = asyncio.start_server
    if listen == "::":
        monkeypatch.setattr(asyncio, "start_server", dual_stack)
    play(scenario, config, listen)


@pytest.mark.parametrize("local", [True, False])
def test_local_discovery_leaves_the_list_alone(local: bool) -> None:
    peers = ("127.0.0.2",) if local else ("127.0.0.0/8",)
    config = replace(CONFIG, discovery=("local", "static"), peers=peers)

    async def scenario(pair: Pair) -> None:
        # The server sees 127.0.0.2, which it lists; the client sees 127.0.0.1.
        here, there = await pair.infos("127.0.0.3" if local else "127.0.0.2")
        assert (here.mode, there.mode) == ("smcr", "smcr")

    play(scenario, config)


@pytest.mark.parametrize("side", ["client", "server"])
def test_without_a_port_there_is_one_reason(side: str) -> None:
    why = "network device lo carries the connection, but no RDMA device"

    async def scenario(pair: Pair) -> None:
        address = b"\x7f\0\0\2" if side == "client" else b"\x7f\0\0\1"
        _ = pair.loop.driver
        pair.loop.ports.problem[address] = why
        infos = await pair.infos()
        lacking, other = infos if side == "client" else infos[::-1]
        assert lacking.mode == other.mode == "tcp"
        assert (lacking.reason.name, lacking.reason.side) == ("NO_DEVICE", "local")
        assert why in lacking.reason.text
        assert other.reason.name == "PEER_DECLINED"
        assert other.reason.peer_code == lacking.reason.code
        pair.loop.ports.problem.clear()
        again, _ = await pair.infos()
        assert again.mode == "smcr", "the next one finds it"

    play(scenario)


@pytest.mark.parametrize("beside", [(), ("shm",)])
def test_a_fabric_that_appears_is_used_by_later_connections(
    monkeypatch: pytest.MonkeyPatch, beside: tuple[str, ...]
) -> None:
    monkeypatch.setattr(Ports, "missing", "this machine has no RDMA device")

    async def scenario(pair: Pair) -> None:
        driver = pair.loop.driver
        why = driver.open()
        assert why is None if beside else why.name == "NO_DEVICE"
        pair.loop.ports.missing = ""
        driver._devices._recheck_at = 0.0
        here, _ = await pair.infos()
        assert (here.mode, here.fabric) == ("smcr", "verbs")

    play(scenario, replace(CONFIG, fabrics=("verbs", *beside)))


def test_a_device_that_is_removed_ends_its_connections_and_comes_back() -> None:
    async def scenario(pair: Pair) -> None:
        here, there = await pair.connect()
        loop = pair.loop
        removed = loop.opened[1]
        descriptor = removed.fileno()
        removed.is_gone = True
        for domain in [domain for each in loop.opened for domain in each.domains]:
            for queue_pair in domain.queue_pairs:
                queue_pair.go_down(Status.PEER_GONE, "the device was removed")
        for reader, _ in (here, there):
            with pytest.raises(ConnectionError):
                await reader.read(1)
        assert len(devices(loop)) == 1
        with pytest.raises(KeyError):
            loop._selector.get_key(descriptor)
        for _, writer in (here, there):
            writer.close()
        info, _ = await pair.infos()
        assert info.mode == "smcr", info.reason
        assert len(loop.opened) == 3

    play(scenario)


@pytest.mark.parametrize("ends_with_the_loop", [False, True])
def test_a_removed_device_that_has_something_to_end_is_closed_later(
    ends_with_the_loop: bool,
) -> None:
    """Closing it would hold the loop; new connections get a new one at once."""

    async def scenario(pair: Pair) -> None:
        here, there = await pair.connect()
        loop, driver = pair.loop, pair.loop.driver
        removed = loop.opened[1]
        removed.is_gone = removed.is_finishing = True
        for domain in [domain for each in loop.opened for domain in each.domains]:
            for queue_pair in domain.queue_pairs:
                queue_pair.go_down(Status.PEER_GONE, "the device was removed")
        for reader, writer in (here, there):
            with pytest.raises(ConnectionError):
                await reader.read(1)
            writer.close()
        assert removed in driver.devices
        assert driver.pump(removed), "it is polled on"
        info, _ = await pair.infos()
        assert info.mode == "smcr", info.reason
        assert len(loop.opened) == 3
        descriptor = removed.fileno()
        loop._selector.get_key(descriptor)
        if ends_with_the_loop:
            return
        removed.is_finishing = False
        assert not driver.pump(removed)
        assert removed not in driver.devices
        with pytest.raises(KeyError):
            loop._selector.get_key(descriptor)

    play(scenario)


def test_a_device_that_goes_before_its_queue_pair_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(pair: Pair) -> None:
        driver = pair.loop.driver
        real = driver.fitting

        def fitting(sock: Any) -> Any:
            found = real(sock)
            for device in driver.devices:
                driver._devices.remove(device)
            return found

        monkeypatch.setattr(driver, "fitting", fitting)
        here, there = await pair.infos()
        assert {here.mode, there.mode} == {"tcp"}
        reasons = {each.reason.name: each.reason for each in (here, there)}
        assert set(reasons) == {"NO_DEVICE", "PEER_DECLINED"}
        assert reasons["NO_DEVICE"].side == "local"
        assert "the device was removed" in reasons["NO_DEVICE"].text

    play(scenario)


class Armed(RoutedLoop):
    """The same, with a driver that arms its devices itself, as on foreign loops."""

    def _make_driver(self) -> Driver:
        driver = super()._make_driver()
        driver._watch = driver._unwatch = None
        driver._arms_itself = True
        return driver


def test_a_loop_that_knows_no_devices_forgets_one_too() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Armed)
        driver = loop.driver
        assert driver.open() is None
        device: Device = loop._open_port(
            "verbs", peer_id=bytes(8), port=loop.ports.find(bytes(4), bytes(4))
        )
        driver.attend(device)
        descriptor = device.fileno()
        assert loop._selector.get_key(descriptor)
        driver.dismiss(device)
        with pytest.raises(KeyError):
            loop._selector.get_key(descriptor)
        device.close()

    with asyncio.Runner(loop_factory=lambda: Armed(CONFIG)) as runner:
        runner.run(run())
