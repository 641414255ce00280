"""The device of a process: one that nobody has to ring for."""

from __future__ import annotations

from tests.testing.simulation.kit import begin


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
