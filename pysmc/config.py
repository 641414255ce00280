"""The configuration: one frozen record, every field also an environment variable.

Decides defaults and what is allowed; knows nothing of how a value is used.

Source: RFC 7609 sections 4.4.1 and 4.8 (waits); Linux values where the RFC leaves
them open (smc_clc.h, smc_llc.h, smc_core.h).
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["KIB", "Config"]

KIB = 1024
RMBE_BYTES_MIN = 16 * KIB
"""Smallest RMBE, size code 0 (RFC 7609 A.2.2)."""
RMBE_BYTES_MAX = 16 * KIB << 15
"""Largest RMBE, size code 15 (Linux from about 6.12; the RFC stops at code 5)."""
UEID_ALPHABET = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-")

_FABRICS = ("shm", "verbs")
_DISCOVERIES = ("tcp_option", "local", "static")


def _default_busy_poll_us() -> int:
    # Spinning on shared words is offered only where its memory order was measured.
    return 100 if platform.machine() in {"x86_64", "AMD64"} else 0


def _wait(default: float) -> Any:
    return field(default=default, metadata={"kind": "wait"})


def _limit(default: int, least: int, most: int) -> Any:
    return field(
        default=default, metadata={"kind": "int", "least": least, "most": most}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """How this process takes part in SMC-R.

    Raises:
        ValueError: A value is not allowed; the text names the field, its value and
            what is allowed.
    """

    fabrics: tuple[str, ...] = ("shm",)
    """Fabrics in order of preference: "shm", "verbs"."""
    discovery: tuple[str, ...] = ("tcp_option", "local")
    """Ways to learn that a peer speaks SMC: "tcp_option", "local", "static"."""
    peers: tuple[str, ...] = ()
    """For "static": host or host:port patterns; the port is the service's."""
    fallback: Literal["allow", "require"] = "allow"
    """What happens where SMC-R is not possible: plain TCP, or `pysmc.Declined`."""
    ueids: tuple[str, ...] = ()
    """User-defined EIDs: up to 32 characters of A-Z, 0-9, "." and "-"."""
    rmbe_bytes: int = 1024 * KIB
    """Receive buffer of a connection in bytes, a power of two from 16 KiB; smaller when
    `max_pinned_bytes` runs short."""
    sndbuf_bytes: int = 1024 * KIB
    """Most bytes in flight of a connection, a power of two from 16 KiB."""
    max_links: int = _limit(1, 1, 1)
    """Links of a link group. Further links are not built yet."""
    max_connections: int = _limit(255, 16, 255)
    """Connections of a link group."""
    release: int = _limit(1, 0, 1)
    """Highest release of SMC-Rv2 that is spoken: 0 is version 2.0, 1 is 2.1."""
    allowed_uids: tuple[int, ...] = ()
    """Users of this host, beside our own, who may be the peer over shm."""
    rdma_device: str = ""
    """For "verbs": name[:port[:gid_index]]; empty chooses by the route."""
    busy_poll_us: int = field(
        default_factory=_default_busy_poll_us,
        metadata={"kind": "int", "least": 0, "most": 10_000},
    )
    """Longest look at shared memory before sleeping, in microseconds; 0 = off."""

    proposal_wait: float = _wait(6.0)
    """Seconds a server waits for the Proposal."""
    accept_wait: float = _wait(6.0)
    """Seconds a client waits for the Accept."""
    confirm_wait: float = _wait(6.0)
    """Seconds a server waits for the Confirm."""
    handshake_wait: float = _wait(10.0)
    """Seconds for the whole handshake."""
    confirm_link_server_wait: float = _wait(2.0)
    """Seconds after which a kernel's server gives up the first link and declines. A
    client whose link fails within them declines at once, later it waits for that."""
    confirm_link_client_wait: float = _wait(4.0)
    """Seconds a client waits for CONFIRM LINK: at least `confirm_link_server_wait` and
    twice `decline_wait`, or a Decline could cross one of a kernel's server. The same at
    both ends."""
    decline_wait: float = _wait(1.0)
    """Seconds that a client waits for a Decline of a kernel's server after that, and
    one `llc_wait` more, before it declines itself; a server waits two of them longer.
    """
    llc_wait: float = _wait(2.0)
    """Seconds to wait for any other LLC answer."""
    test_link_interval: float = _wait(30.0)
    """Seconds of silence on a link before TEST LINK."""
    test_link_wait: float = _wait(2.0)
    """Seconds to wait for the answer to TEST LINK."""
    idle_group_wait: float = _wait(600.0)
    """Seconds that a link group without connections is kept."""
    close_wait: float = _wait(10.0)
    """Seconds to wait for the peer's close after ours; then it loses our buffer."""
    discovery_wait: float = _wait(1.0)
    """Seconds that a marked connection waits to be confirmed before it is TCP."""

    max_handshakes: int = _limit(1024, 1, 65536)
    """Handshakes in progress of the loop, as client and server; more are TCP."""
    max_handshakes_per_peer: int = _limit(32, 1, 65536)
    """Handshakes in progress with one address of another host, as server; more are TCP.
    Peers of this host have one address in common, and share `max_handshakes`."""
    max_link_groups: int = _limit(1024, 1, 65536)
    """Link groups in all; more connections are TCP."""
    max_link_groups_per_peer: int = _limit(8, 1, 64)
    """Link groups with one peer in one role; more connections are TCP."""
    max_idle_rmbs: int = _limit(16, 0, 255)
    """Confirmed receive buffers that an idle link group keeps for reuse."""
    max_pinned_bytes: int = _limit(1 << 29, 1 << 20, 1 << 44)
    """Receive buffers of all connections in bytes. Each takes at most one of 256 shares
    of what is left; with nothing left, more connections are TCP."""
    max_pinned_bytes_per_peer: int = _limit(1 << 28, 1 << 20, 1 << 44)
    """The same with one peer: another host, or a process of this one. Each takes at
    most one of 128 shares of what is left."""
    max_llc_requests_per_second: int = _limit(1000, 10, 1_000_000)
    """LLC requests of a peer on one link that are answered, also at once after a
    silence; more are dropped."""

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item.name, getattr(self, item.name), dict(item.metadata))
        if "static" not in self.discovery and self.peers:
            _refuse("peers", self.peers, 'nothing unless discovery contains "static"')
        if self.rdma_device and not _is_rdma_device(self.rdma_device):
            text = "name, name:port (1-255) or name:port:gid_index, as in rxe0:1:1"
            _refuse("rdma_device", self.rdma_device, text)
        least = self.confirm_link_server_wait + 2 * self.decline_wait
        if self.confirm_link_client_wait < least - 1e-9:
            # The server's Decline has to come before the client's goes out.
            text = f"at least {least}: confirm_link_server_wait and twice decline_wait"
            _refuse("confirm_link_client_wait", self.confirm_link_client_wait, text)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Read every ``PYSMC_<FIELD>`` that is set; lists are comma-separated.

        Args:
            environ: Where to look; the process's environment by default. A variable
                that names no field is left alone: a newer version may know it.

        Raises:
            ValueError: A variable has a value that is not allowed.
        """
        source = os.environ if environ is None else environ
        types = {item.name: str(item.type) for item in fields(cls)}
        values: dict[str, Any] = {}
        for key, text in source.items():
            if not key.startswith("PYSMC_"):
                continue
            name = key.removeprefix("PYSMC_").lower()
            if name in types:
                values[name] = _from_text(name, text, types[name])
        return cls(**values)


def _from_text(name: str, text: str, type_name: str) -> Any:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    try:
        if type_name == "tuple[int, ...]":
            return tuple(int(word) for word in words)
        if type_name.startswith("tuple"):
            return words
        if type_name == "int":
            return int(text)
        if type_name == "float":
            return float(text)
    except ValueError:
        _refuse(f"{name} (PYSMC_{name.upper()})", text, f"a value of type {type_name}")
    return text.strip()


def _check(name: str, value: Any, metadata: dict[str, Any]) -> None:
    match name, metadata.get("kind"):
        case _, "wait":
            good = isinstance(value, int | float) and 0 < value <= 86_400
            _require(good, name, value, "seconds, more than 0 and at most 86400")
        case _, "int":
            least, most = metadata["least"], metadata["most"]
            good = type(value) is int and least <= value <= most
            _require(good, name, value, f"a whole number from {least} to {most}")
        case "fabrics", _:
            _require(_chosen(value, _FABRICS), name, value, f"a tuple of {_FABRICS}")
        case "discovery", _:
            good = _chosen(value, _DISCOVERIES)
            _require(good, name, value, f"a tuple of {_DISCOVERIES}")
        case "fallback", _:
            good = value in {"allow", "require"}
            _require(good, name, value, '"allow" or "require"')
        case (("rmbe_bytes" | "sndbuf_bytes"), _):
            good = type(value) is int and value & (value - 1) == 0
            good = good and RMBE_BYTES_MIN <= value <= RMBE_BYTES_MAX
            _require(good, name, value, "a power of two from 16384 to 536870912")
        case "ueids", _:
            good = isinstance(value, tuple) and len(value) <= 4
            good = good and all(_is_ueid(ueid) for ueid in value)
            text = 'up to 4 names of 1-32 characters A-Z, 0-9, "." and "-"'
            _require(good, name, value, text)
        case "allowed_uids", _:
            good = isinstance(value, tuple)
            good = good and all(type(uid) is int and uid >= 0 for uid in value)
            _require(good, name, value, "a tuple of user numbers")
        case "peers", _:
            good = isinstance(value, tuple) and all(isinstance(p, str) for p in value)
            _require(good, name, value, "a tuple of host or host:port patterns")
        case _:
            _require(isinstance(value, str), name, value, "text")


def _chosen(value: Any, allowed: tuple[str, ...]) -> bool:
    return (
        isinstance(value, tuple)
        and all(item in allowed for item in value)
        and len(set(value)) == len(value)
    )


def _is_ueid(text: Any) -> bool:
    return (
        isinstance(text, str)
        and 1 <= len(text) <= 32
        and set(text) <= UEID_ALPHABET
        and text[0] not in ".-"
        and ".." not in text
    )


def _is_rdma_device(text: str) -> bool:
    name, *numbers = text.split(":")
    return (
        name != ""
        and name.isascii()
        and not set(name) & set("/ \t\n")
        and len(numbers) <= 2
        and all(number.isascii() and number.isdigit() for number in numbers)
        and all(int(number) in range(1, 256) for number in numbers[:1])
    )


def _require(is_good: object, name: str, value: Any, allowed: str) -> None:
    if not is_good:
        _refuse(name, value, allowed)


def _refuse(name: str, value: Any, allowed: str) -> None:
    message = f"{name} is {value!r}; allowed is {allowed}"
    raise ValueError(message)
