"""A loop on the simulated fabric, for tests of programs and of this package.

`SimLoop` is a `pysmc.Loop` in everything but one: its device belongs to a
`pysmc.fabric.sim.SimNetwork` instead of to this host. So the handshake, the links and
the data path are the real ones, TCP connections are real and on this host, and what
happens between two queue pairs can be watched, held back, cut or made to fail.

    loop = SimLoop()
    server = await asyncio.start_server(...)       # both ends in one loop
    ...
    assert writer.get_extra_info("smc").fabric == "sim"
    loop.network.hold(queue_pair)                  # see SimNetwork

Two loops meet over it when they share a network, and then they run in one thread: a
simulated network knows no threads. Ends of two networks have no EID in common, and
their connections stay on TCP.

Reference: RFC 7609 section 2.1 (the RNIC that it stands in for).
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from pysmc.aio.devices import CODEC
from pysmc.aio.driver import Driver
from pysmc.aio.loop import Loop
from pysmc.config import Config
from pysmc.errors import FabricUnavailable
from pysmc.fabric.sim import SimNetwork

if TYPE_CHECKING:
    from pysmc.fabric.base import UpdateCodec
    from pysmc.fabric.sim import SimDevice

__all__ = ["SimLoop", "new_sim_loop", "new_sim_network"]

_threads: weakref.WeakKeyDictionary[SimNetwork, int] = weakref.WeakKeyDictionary()


def new_sim_network(seed: int = 0, *, newest_only: bool = False) -> SimNetwork:
    """Make a network that loops can share.

    It delivers at once what is posted, as far as it is not held or delayed, and its
    updates travel as CDC messages.

    Args:
        seed: Decides every choice.
        newest_only: Deliver only the newest update of each connection, as shm does.
    """
    return SimNetwork(seed, codec=CODEC, newest_only=newest_only, auto=True)


class SimLoop(Loop):
    """A pysmc loop whose device is simulated.

    Args:
        config: How to take part; from the environment by default. Whatever fabrics it
            names, the simulated one stands in for them; without any the loop has none.
        network: Where its device belongs; a network of its own by default. It must
            deliver by itself, as those of `new_sim_network` do.

    Raises:
        ValueError: A value of the configuration is not allowed, or the network does not
            deliver by itself.
    """

    __slots__ = ("network",)

    network: SimNetwork
    """The world of the loop's device: hold, delay, cut, faults and trace."""

    def __new__(
        cls, config: Config | None = None, network: SimNetwork | None = None
    ) -> Self:
        """Check what is given while no loop exists that would need closing."""
        if network is not None and not (network.auto and network.codec):
            message = (
                "network must have auto=True and a codec: nobody drives it beside the "
                "loop; new_sim_network() makes such a one"
            )
            raise ValueError(message)
        config = Config.from_env() if config is None else config
        loop = super().__new__(cls, replace(config, fabrics=config.fabrics[:1]))
        loop.network = new_sim_network() if network is None else network
        return loop

    def __init__(
        self, config: Config | None = None, network: SimNetwork | None = None
    ) -> None:
        del network  # kept by __new__
        super().__init__(config)

    def _make_driver(self) -> Driver:
        return Driver(self, self.config, self._watch_device, self._open_device)

    def _open_device(
        self, name: str, *, peer_id: bytes, config: Config, codec: UpdateCodec
    ) -> SimDevice:
        del name, config, codec
        network, thread = self.network, threading.get_ident()
        if _threads.setdefault(network, thread) != thread:
            operation = "open the sim fabric"
            reason = "a simulated network belongs to the thread of its first loop"
            raise FabricUnavailable(operation, "UNAVAILABLE", reason)
        device = network.device(peer_id)
        # Whoever is on another network, or in another process, is not reachable.
        device.eid = f"SIM-{os.getpid()}-{id(network):X}"
        return device


def new_sim_loop() -> SimLoop:
    """Make a loop with a network of its own; a factory without arguments.

    For asyncio.Runner, pytest-asyncio's loop factories and others.

    Raises:
        ValueError: A value of the configuration is not allowed.
    """
    return SimLoop()
