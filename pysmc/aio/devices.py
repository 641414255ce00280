"""The devices of one loop: when they are opened, and what is said when they cannot be.

Decides which fabrics of the configuration are there, and which of their devices a
connection may use. A fabric with one device is opened at once; of a fabric with many
(RoCE has one for each port and GID) the connection's route decides which one it is, and
the first connection that needs it opens it. Opening is left to a function, so that a
loop of another world (`pysmc.testing.loops`) brings its own devices. What moves over a
device is the driver's business.

Reference: RFC 7609 section 2.1; kernel counterparts: smc_ib.c, smc_pnet.c.
"""

from __future__ import annotations

import logging
import resource
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pysmc.core.endpoint import FabricOffer
from pysmc.core.handshake import NOTHING_ABSENT
from pysmc.core.negotiator import reason_of_status
from pysmc.discovery.address import bound_device, endpoint
from pysmc.errors import FabricError, FabricUnavailable
from pysmc.fabric import open_device, open_finder
from pysmc.fabric.base import Status, UpdateCodec
from pysmc.reasons import Reason, reason
from smcproto import cdc, llc

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Collection, Mapping, Sequence

    from pysmc.config import Config
    from pysmc.fabric.base import Device
    from pysmc.fabric.verbs_ports import RdmaPort
    from pysmc.fabric.verbs_route import PortFinder

__all__ = [
    "ALL",
    "CODEC",
    "Devices",
    "FinderOpener",
    "Fitting",
    "Opener",
    "raise_descriptor_limit",
]

log = logging.getLogger("pysmc")

RECHECK_SECONDS = 1.0
"""How often a fabric that was not there is looked for again."""
FRESH_SECONDS = 1.0
"""How long connections between the same two addresses are not looked up anew. To find
out which port carries one takes two dozen system calls, some of which ask the hardware,
and the client waits for it. What ends a port its device is told."""
FRESH_MAX = 256
"""Pairs of addresses that are kept in mind."""

CODEC = UpdateCodec(
    pack=cdc.pack,
    unpack=cdc.unpack,
    is_update=lambda data: data[:1] == b"\xfe",
    is_question=llc.is_question,
)
"""How an update becomes a CDC message."""


class Opener(Protocol):
    """Opens the device of a fabric, as `pysmc.fabric.open_device` does.

    A fabric with many devices is given the port as well, as ``port``.
    """

    def __call__(
        self, name: str, *, peer_id: bytes, config: Config, codec: UpdateCodec
    ) -> Device:
        """Open it, or raise `FabricUnavailable` or another `FabricError`."""


class FinderOpener(Protocol):
    """Gives what finds the ports of a fabric, as `pysmc.fabric.open_finder` does."""

    def __call__(self, name: str, config: Config) -> PortFinder | None:
        """Give it, or None for a fabric with one device."""


class Fitting(NamedTuple):
    """What one connection may use."""

    offers: Sequence[FabricOffer] | None = None
    """In order of preference; None is all of those that are open."""
    absent: Mapping[str, Reason] = NOTHING_ABSENT
    """Why a device cannot be used, by the EIDs that would select it."""

    @property
    def refusal(self) -> Reason | None:
        """Why it cannot be SMC-R at all; None when it can."""
        if self.offers is None or self.offers:
            return None
        return next(iter(self.absent.values()))


ALL = Fitting()

_Way = tuple[str, bytes, bytes, int]
"""A fabric, and what `_way_of` gives."""


class Devices:
    """The devices that one driver has opened.

    Args:
        config: Names the fabrics, in order of preference.
        opener: Opens them; None is `pysmc.fabric.open_device`.
        attend: Is told of each device that was opened.
        dismiss: Is told of each device that is about to be closed.
        finder: Gives what finds the ports of a fabric with many devices; None is
            `pysmc.fabric.open_finder`, or nothing with an opener of one's own.
    """

    def __init__(
        self,
        config: Config,
        opener: Opener | None = None,
        attend: Callable[[Device], None] | None = None,
        dismiss: Callable[[Device], None] | None = None,
        finder: FinderOpener | None = None,
    ) -> None:
        self.by_name: dict[str, Device] = {}
        """What is open, by the device's name."""
        self.leaving: list[Device] = []
        """Removed, and busy with their end."""
        self.unavailable: dict[str, str] = {}
        """Fabrics that could not be opened, with what is missing."""
        self._config = config
        self._opener = opener
        self._attend = attend
        self._dismiss = dismiss
        self._find = finder or (_no_finder if opener is not None else open_finder)
        self._peer_id = b""
        self._short_of_something = False
        self._fixed: dict[str, FabricOffer] = {}  # by the configured fabric's name
        self._finders: dict[str, PortFinder] = {}
        self._usable: dict[str, bool] = {}
        self._ports: dict[str, RdmaPort] = {}
        self._fresh: dict[_Way, tuple[float, str]] = {}
        """Until when a connection's device is known, and its name."""
        self._recheck_at = 0.0
        self._opened = 0

    # Fabrics

    def open(self, peer_id: bytes) -> list[FabricOffer]:
        """Open every fabric of the configuration that is there.

        Args:
            peer_id: 8 bytes, of this loop.

        Returns:
            The devices that every connection may use.
        """
        raise_descriptor_limit()
        self._peer_id = peer_id
        self._short_of_something = False
        for name in self._config.fabrics:
            finder = self._finders.get(name) or self._find(name, self._config)
            if finder is None:
                self._open_fixed(name)
            else:
                self._finders[name] = finder
                self._check(name, finder)
        return list(self._fixed.values())

    def why_none(self) -> Reason | None:
        """Say why no fabric could be opened; None when one was.

        It is a LIMIT where the same may succeed the next time.
        """
        if self.by_name or any(self._usable.values()):
            return None
        if not self._config.fabrics:
            return reason("DISABLED", "local")
        missing = [f"{name}: {why}." for name, why in self.unavailable.items()]
        name = "LIMIT" if self._short_of_something else "NO_DEVICE"
        return reason(name, "local", " ".join(missing))

    def recheck(self, now: float) -> bool:
        """Look again for fabrics with many devices: one may have been plugged in.

        Args:
            now: The time in seconds; more often than once in `RECHECK_SECONDS`
                nothing is done.

        Returns:
            True when one is there that was not.
        """
        if all(self._usable.values()) or now < self._recheck_at:
            return False
        self._recheck_at = now + RECHECK_SECONDS
        before = sum(self._usable.values())
        for name, usable in list(self._usable.items()):
            if not usable:
                self._check(name, self._finders[name])
        return sum(self._usable.values()) > before

    def _open_fixed(self, name: str) -> None:
        if name in self._fixed:
            return
        try:
            device = self._open_and_ring(name)
            # Its own name counts: another world may stand in for the one asked for.
            self._fixed[name] = self._offer(device, device.fabric)
        except OSError as error:
            # Every FabricError is one too; others come from loading the fabric's code.
            if not isinstance(error, FabricUnavailable):
                self._short_of_something = True
            self._lacks(name, error)

    def _check(self, name: str, finder: PortFinder) -> bool:
        """Tell whether any connection could use a fabric with many devices."""
        try:
            finder.check()
        except FabricError as error:
            if not isinstance(error, FabricUnavailable):
                self._short_of_something = True
            if self.unavailable.get(name) != error.detail:
                self._lacks(name, error)
            self._usable[name] = False
        else:
            self.unavailable.pop(name, None)
            self._usable[name] = True
        return self._usable[name]

    def _lacks(self, name: str, error: OSError) -> None:
        detail = error.detail if isinstance(error, FabricError) else ""
        self.unavailable[name] = detail or str(error)
        log.warning("fabric %s is not available: %s", name, error)

    # Devices of connections

    def fitting(
        self, sock: socket.socket, in_use: Callable[[], Collection[str]], now: float
    ) -> Fitting:
        """Find, and open where it is not, what fits a connection.

        Args:
            sock: Connected.
            in_use: Names the devices with link groups.
            now: The time in seconds.
        """
        if not self._finders:
            return ALL
        offers: list[FabricOffer] = []
        absent: dict[str, Reason] = {}
        for name in self._config.fabrics:
            if name in self._fixed:
                offers.append(self._fixed[name])
            elif name in self._finders:
                found = self._fit(name, sock, in_use, now)
                if isinstance(found, FabricOffer):
                    offers.append(found)
                else:
                    # Without an EID it is still the reason of a connection that has
                    # nothing else.
                    absent |= dict.fromkeys(self._config.ueids or ("",), found)
        return Fitting(offers, absent)

    def _fit(
        self,
        name: str,
        sock: socket.socket,
        in_use: Callable[[], Collection[str]],
        now: float,
    ) -> FabricOffer | Reason:
        if not self._usable[name]:
            return reason("NO_DEVICE", "local", f"{name}: {self.unavailable[name]}.")
        try:
            way = name, *_way_of(sock)
            return self._fresh_offer(way, now) or self._find_offer(way, in_use, now)
        except FabricUnavailable as error:
            why = "VLAN" if error.status == "VLAN" else "NO_DEVICE"
            return reason(why, "local", f"{name}: {error.detail}.")
        except FabricError as error:
            log.warning("fabric %s cannot be used: %s", name, error)
            status = Status.__members__.get(error.status, Status.UNREACHABLE)
            return reason_of_status(status.value, error.detail)
        except OSError as error:
            return reason("NO_DEVICE", "local", f"{name}: {error}.")

    def _fresh_offer(self, way: _Way, now: float) -> FabricOffer | None:
        """Give the device that such a connection had just now, if nothing ended it."""
        until, called = self._fresh.get(way, (now, ""))
        device = self.by_name.get(called)
        if device is None or device.is_gone or until <= now:
            return None
        return self._offer_of(device, called)

    def _find_offer(
        self, way: _Way, in_use: Callable[[], Collection[str]], now: float
    ) -> FabricOffer:
        name, local, peer, interface = way
        port = self._finders[name].find(local, peer, interface)
        offer = self._device_at(name, port, in_use)
        if len(self._fresh) >= FRESH_MAX:
            self._fresh.clear()
        self._fresh[way] = now + FRESH_SECONDS, offer.device
        return offer

    def _device_at(
        self, name: str, port: RdmaPort, in_use: Callable[[], Collection[str]]
    ) -> FabricOffer:
        """Give the device of a port; it is opened when its first connection comes."""
        called = f"{name}:{port.name}"
        for other, there in list(self._ports.items()):
            if there.name != port.name or other not in self.by_name:
                continue
            device = self.by_name[other]
            is_same = there.gid == port.gid and there.netdev == port.netdev
            if is_same and not device.is_gone:
                return self._offer_of(device, other)
            # The port has another address by now; links of the old one may live on.
            if device.is_gone or other not in in_use():
                self.remove(device)
        self._opened += 1
        if called in self.by_name:
            called = f"{called}#{self._opened}"
        offer = self._offer(self._open_and_ring(name, port=port), called)
        self._ports[called] = port
        return offer

    def remove(self, device: Device) -> bool:
        """Use a device no longer, and close it once that holds nobody up. Idempotent.

        Until then it is polled like the others, and comes here again.

        Returns:
            True when it is closed.
        """
        for name, there in list(self.by_name.items()):
            if there is device:
                del self.by_name[name]
                self._ports.pop(name, None)
                self._fresh.clear()  # the next one may get its name
                self.leaving.append(device)
        if device not in self.leaving:
            return True
        if device.is_finishing:
            return False
        self.leaving.remove(device)
        if self._dismiss is not None:
            self._dismiss(device)
        device.close()
        return True

    def close(self) -> None:
        """Close what finds ports; devices are closed by who attends to them."""
        for finder in self._finders.values():
            finder.close()

    def _open_and_ring(self, name: str, **port: Any) -> Device:
        """Open a device, and the descriptor that the loop will watch."""
        opener = open_device if self._opener is None else self._opener
        device = opener(
            name, peer_id=self._peer_id, config=self._config, codec=CODEC, **port
        )
        try:
            device.fileno()
        except BaseException:
            device.close()
            raise
        return device

    def _offer(self, device: Device, called: str) -> FabricOffer:
        """Count a device as open, once the loop watches it."""
        try:
            if self._attend is not None:
                self._attend(device)
        except BaseException:
            device.close()
            raise
        self.by_name[called] = device
        return self._offer_of(device, called)

    def _offer_of(self, device: Device, called: str) -> FabricOffer:
        eids = (device.eid,) if device.eid else self._config.ueids
        return FabricOffer(
            device.fabric, eids, device.gid, device.mac, device.mtu_code, called
        )


def _no_finder(name: str, config: Config) -> None:
    """Find no ports: an opener of one's own opens the only device of each fabric."""
    del name, config


def _way_of(sock: socket.socket) -> tuple[bytes, bytes, int]:
    """Give both addresses of a connected socket, and the device that it is bound to.

    Raises:
        OSError: It is not connected any more.
    """
    local, peer = endpoint(sock.getsockname()), endpoint(sock.getpeername())
    assert local is not None, "a TCP socket has an address"
    assert peer is not None, "a connected TCP socket has a peer"
    return local.packed, peer.packed, bound_device(sock) or peer.scope


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
