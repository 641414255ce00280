"""Deterministic simulation: whole programs on a simulated fabric, TCP and clock.

A `World` runs the real library and the program of a test in one thread, without real
sockets and real time. Its seed decides the order of everything that may happen in more
than one, so that a run can be repeated exactly.

    world = World(seed=1)
    server, client = world.process("server"), world.process("client")
    listener = server.listen(7)
    server.start(serve(listener))
    world.run(until=client.start(talk(client, listener)))
    assert world.close() == []

Reference: the page "Simulation" of the documentation.
"""

from __future__ import annotations

from pysmc.testing.simulation.process import Process
from pysmc.testing.simulation.world import Stuck, TooManySteps, World

__all__ = ["Process", "Stuck", "TooManySteps", "World"]
