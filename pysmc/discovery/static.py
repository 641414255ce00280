"""The list of peers that are known to speak SMC, from the configuration.

Decides whether an address and port match one of ``Config.peers``. Names are not
resolved: a pattern is compared with the numeric address of the connection. Knows
nothing of sockets.

Source: design decision "static"; address texts as in RFC 4291 and RFC 4632 (CIDR).
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pysmc.discovery.address import Endpoint

__all__ = ["PeerPattern", "StaticPeers"]

PORT_MAX = 65535

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class PeerPattern:
    """One pattern: a network, which may be a single address, and perhaps a port."""

    network: _Network
    """Addresses that match."""
    port: int | None = None
    """The service's port, None for every port."""

    @classmethod
    def parse(cls, text: str) -> PeerPattern:
        """Read ``host``, ``host:port``, ``[ipv6]:port``; host may be a CIDR network.

        Raises:
            ValueError: The text is none of these; it is quoted with what is allowed.
        """
        host, port = _split(text)
        try:
            network = ipaddress.ip_network(host, strict=False)
        except ValueError:
            _refuse(text)
        if isinstance(network, ipaddress.IPv6Network):
            mapped = network.network_address.ipv4_mapped
            if mapped is not None and network.prefixlen >= 96:
                network = ipaddress.IPv4Network(
                    (mapped, network.prefixlen - 96), strict=False
                )
        return cls(network, port)

    def matches(
        self, address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
    ) -> bool:
        """Tell whether the service at this address and port is meant."""
        return (self.port is None or self.port == port) and address in self.network


class StaticPeers:
    """All patterns of a configuration."""

    def __init__(self, patterns: Iterable[str]) -> None:
        """Read the patterns.

        Raises:
            ValueError: One of them cannot be read.
        """
        self._patterns = tuple(PeerPattern.parse(text) for text in patterns)

    def __contains__(self, service: tuple[Endpoint, int]) -> bool:
        """Tell whether (the peer's address, the service's port) is listed.

        The service's port is the remote port for a client and the local one for a
        server.
        """
        peer, port = service
        address = ipaddress.ip_address(peer.packed)
        return any(pattern.matches(address, port) for pattern in self._patterns)


def _split(text: str) -> tuple[str, int | None]:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            _refuse(text)
        port = rest[1:] if rest else None
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:  # IPv4 without a port, or IPv6 without brackets and thus without a port
        return text, None
    if port is None:
        return host, None
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= PORT_MAX):
        _refuse(text)
    return host, int(port)


def _refuse(text: str) -> NoReturn:
    message = (
        f"peers contains {text!r}; allowed is a numeric address or network, "
        "with or without a port: 10.0.0.1, 10.0.0.0/8, 10.0.0.1:80, [fd00::1]:80"
    )
    raise ValueError(message)
