"""Tests whose both ends are in one process, run over another fabric than usual.

``PYSMC_TEST_FABRIC=verbs PYSMC_TEST_HOST=10.0.0.1 python -m pytest IDS`` runs named
tests of ``tests/aio`` and ``tests/twins`` with that fabric and a list of peers in place
of the discovery of this host, at an address that a route over the fabric's devices
leads to. Every connection that is not meant to be TCP has to be on that fabric, at both
ends, in version 2.1. Without the variables nothing changes.

Tests that speak of shared memory, of turns of one loop, or with a peer that knows no
SMC cannot be run so; ``tests/lab`` names those that are.

Needs the standard library only, so that other Pythons can run the twins.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any

from pysmc.aio.loop import Loop

if TYPE_CHECKING:
    from pysmc.config import Config

FABRIC = os.environ.get("PYSMC_TEST_FABRIC", "")
"""What is asked for; empty for the usual one."""
HOST = os.environ.get("PYSMC_TEST_HOST", "127.0.0.1")
"""Where tests listen."""
NETWORK = str(ip_network(f"{HOST}/24", strict=False))


def adapted(config: Config) -> Config:
    """Let a configuration use the fabric that was asked for, unless it is for TCP."""
    if not FABRIC or not config.discovery:
        return config
    return replace(
        config,
        fabrics=(FABRIC,),
        discovery=("static",),
        peers=(NETWORK,),
        ueids=("PYSMC.TEST",),
    )


class Watched:
    """Remembers what each transport of a loop says about its connection."""

    seen: list[Any]

    def _make_socket_transport(self: Any, *args: Any, **options: Any) -> Any:
        made = super()._make_socket_transport(*args, **options)  # type: ignore[misc]
        self.call_soon(self._note, made)
        return made

    def _make_ssl_transport(self: Any, *args: Any, **options: Any) -> Any:
        made = super()._make_ssl_transport(*args, **options)  # type: ignore[misc]
        # Not earlier: TLS knows the transport beneath it from connection_made on.
        self.call_soon(self._note, made)
        return made

    def _note(self, transport: Any) -> None:
        self.seen.append(transport.get_extra_info("smc"))


class WatchedLoop(Watched, Loop):
    """A loop that remembers its connections.

    Args:
        config: How to take part.
    """

    def __init__(self, config: Config | None = None) -> None:
        self.seen = []
        super().__init__(config)


def check(seen: list[Any], config: Config) -> None:
    """See that each connection was what the configuration asks for, at both ends.

    Raises:
        AssertionError: One was not; all of them are shown.
    """
    told = {(info.mode, info.version, info.fabric) for info in seen}
    wanted = ("smcr", "2.1", FABRIC) if config.discovery else ("tcp", None, None)
    assert told <= {wanted}, [(info.role, info.reason) for info in seen]
    roles = Counter(info.role for info in seen)
    assert roles["client"] == roles["server"], seen
