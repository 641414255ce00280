"""The devices of one loop: when they are opened, and what is said when they cannot be.

Decides which fabrics of the configuration are there. Opening is left to a function, so
that a loop of another world (`pysmc.testing.loops`) brings its own devices. What moves
over a device is the driver's business.

Reference: RFC 7609 section 2.1; kernel counterpart: smc_ib.c.
"""

from __future__ import annotations

import logging
import resource
from typing import TYPE_CHECKING, Protocol

from pysmc.core.endpoint import FabricOffer
from pysmc.errors import FabricError, FabricUnavailable
from pysmc.fabric import open_device
from pysmc.fabric.base import UpdateCodec
from pysmc.reasons import Reason, reason
from smcproto import cdc

if TYPE_CHECKING:
    from pysmc.config import Config
    from pysmc.fabric.base import Device

__all__ = ["CODEC", "Devices", "Opener", "raise_descriptor_limit"]

log = logging.getLogger("pysmc")

CODEC = UpdateCodec(
    pack=cdc.pack, unpack=cdc.unpack, is_update=lambda data: data[:1] == b"\xfe"
)
"""How an update becomes a CDC message."""


class Opener(Protocol):
    """Opens the device of a fabric, as `pysmc.fabric.open_device` does."""

    def __call__(
        self, name: str, *, peer_id: bytes, config: Config, codec: UpdateCodec
    ) -> Device:
        """Open it, or raise `FabricUnavailable` or another `FabricError`."""


class Devices:
    """The devices that one driver has opened.

    Args:
        config: Names the fabrics, in order of preference.
        opener: Opens them; None is `pysmc.fabric.open_device`.
    """

    def __init__(self, config: Config, opener: Opener | None = None) -> None:
        self.by_name: dict[str, Device] = {}
        """What is open, by the fabric's name."""
        self.unavailable: dict[str, str] = {}
        """Fabrics that could not be opened, with what is missing."""
        self._config = config
        self._opener = opener
        self._short_of_something = False

    def open(self, peer_id: bytes) -> list[FabricOffer]:
        """Open every fabric of the configuration that is there.

        Args:
            peer_id: 8 bytes, of this loop.
        """
        raise_descriptor_limit()
        self._short_of_something = False
        found = (self._open(name, peer_id) for name in self._config.fabrics)
        return [offer for offer in found if offer is not None]

    def why_none(self) -> Reason | None:
        """Say why no fabric could be opened; None when one was.

        It is a LIMIT where the same may succeed the next time.
        """
        if self.by_name:
            return None
        if not self._config.fabrics:
            return reason("DISABLED", "local")
        missing = [f"{name}: {why}." for name, why in self.unavailable.items()]
        name = "LIMIT" if self._short_of_something else "NO_DEVICE"
        return reason(name, "local", " ".join(missing))

    def _open(self, name: str, peer_id: bytes) -> FabricOffer | None:
        try:
            device = self._open_and_ring(name, peer_id)
        except OSError as error:
            # Every FabricError is one too; others come from loading the fabric's code.
            detail = error.detail if isinstance(error, FabricError) else ""
            self.unavailable[name] = detail or str(error)
            if not isinstance(error, FabricUnavailable):
                self._short_of_something = True
            log.warning("fabric %s is not available: %s", name, error)
            return None
        # Its own name counts: another world may stand in for the one that was asked.
        self.by_name[device.fabric] = device
        eids = (device.eid,) if device.eid else self._config.ueids
        return FabricOffer(device.fabric, eids, device.gid, device.mac, device.mtu_code)

    def _open_and_ring(self, name: str, peer_id: bytes) -> Device:
        """Open a device, and the descriptor that the loop will watch."""
        opener = open_device if self._opener is None else self._opener
        device = opener(name, peer_id=peer_id, config=self._config, codec=CODEC)
        try:
            device.fileno()
        except BaseException:
            device.close()
            raise
        return device


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open descriptors to the hard one.

    A link takes descriptors beside those of TCP, and the usual soft limit of 1,024 was
    made for programs that call select().
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.debug("the limit of descriptors stays at %d: %s", soft, error)
