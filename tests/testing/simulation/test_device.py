"""The device of a process: one that nobody has to ring for."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from tests.testing.simulation.kit import begin


@pytest.mark.parametrize("newest_only", [False, True])
def test_a_crash_forgets_what_a_network_interface_has_not_sent(newest_only) -> None:
    """And nothing that lies in shared memory."""
    received = set()
    for seed in range(30):
        got: list[int] = []

        async def serve(reader: Any, writer: Any, got: list[int] = got) -> None:
            with contextlib.suppress(OSError):
                while data := await reader.read(10_000):
                    got.append(len(data))
            writer.close()

        kit = begin(seed, serve=serve, newest_only=newest_only)

        async def talk(kit: Any = kit) -> Any:
            _, writer = await kit.client.open_connection(kit.listener)
            for _ in range(5):
                writer.write(b"x" * 1000)
            return writer

        writer = kit.run(talk())
        assert writer.get_extra_info("smc").mode == "smcr"
        assert sum(got) == 0, "it has not arrived"
        kit.client.crash()
        kit.world.run(until=kit.world.now + 10)
        received.add(sum(got))
        assert kit.close() == []
    # asyncio's reader gives an error before what it still has.
    parts = received - {0, 5000}
    assert parts == set() if newest_only else parts, received
    assert 5000 in received


def test_a_device_lives_as_long_as_its_loop() -> None:
    kit = begin(1)
    assert kit.run(kit.talk(b"x")) == b"x"
    (device,) = kit.client.driver.devices
    assert device.fileno() in kit.client.descriptors.owners
    assert not device.pending()
    assert not device.is_readable()  # type: ignore[attr-defined]
    assert not device.is_writable()  # type: ignore[attr-defined]
    assert not device.forked  # type: ignore[attr-defined]
    assert kit.close() == []
    device.close()
    assert device.fileno() == -1
