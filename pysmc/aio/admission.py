"""Who may shake hands: how many negotiations a loop has at a time, and with whom.

`Admission` counts them and says which limit one more would exceed. It also keeps book
of every limit that was exceeded, its own and the core's: each occasion is counted, and
the first of a kind is logged. It decides nothing else; what becomes of a connection
that is one too many is the driver's business.

Peers of another host are also counted by address. Those of this host have one address
in common, and share what the loop has; strangers' too until their user is known.

Reference: RFC 7609 names no limits; kernel counterpart: smc_hs_congested() in af_smc.c.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from pysmc.discovery.address import endpoint, is_local
from pysmc.reasons import Reason, reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.config import Config

__all__ = ["Admission"]

log = logging.getLogger("pysmc")


class Admission:
    """The negotiations of one loop.

    Args:
        config: Names the limits.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._count = 0
        self._by_host: Counter[str] = Counter()
        self.excess: Counter[str] = Counter()
        """How often each of the limits that are counted here was exceeded."""
        self._reasons: dict[str, Reason] = {}
        self.is_here: Callable[[str], bool] = _is_here
        """Tells whether an address is of this host; a simulated one knows itself."""

    def __len__(self) -> int:
        return self._count

    def has_room(self) -> bool:
        """Whether another negotiation may begin."""
        return self._count < self._config.max_handshakes

    def may_refuse(self) -> bool:
        """Whether one too many may at least be told so: as many again."""
        return self._count < 2 * self._config.max_handshakes

    def negotiating(self, host: str | None = None) -> AbstractContextManager[None]:
        """Count a negotiation while it lasts.

        Args:
            host: Numeric address of the client, if it is counted by that.
        """
        return _Counted(self, host)

    def begin(self, host: str | None = None) -> None:
        """Count one more."""
        self._count += 1
        if host is not None:
            self._by_host[host] += 1

    def end(self, host: str | None = None) -> None:
        """Count one less."""
        self._count -= 1
        if host is not None:
            self._by_host[host] -= 1
            if not self._by_host[host]:
                del self._by_host[host]

    def exceeded(self, host: str | None = None, times: int = 1) -> str | None:
        """Name the limit that is exceeded by what is counted now, None for none.

        Args:
            host: Numeric address of the client, if it is counted by that.
            times: Look at so many times each limit.
        """
        config = self._config
        if self._count > times * config.max_handshakes:
            return "max_handshakes"
        limit = times * config.max_handshakes_per_peer
        if host is not None and self._by_host[host] > limit and not self.is_here(host):
            return "max_handshakes_per_peer"
        return None

    def over(self, name: str) -> Reason:
        """Count a connection that is beyond a limit, and say so.

        Args:
            name: The limit's field of the configuration.
        """
        limit: int = getattr(self._config, name)
        self.excess[name] += 1
        if name not in self._reasons:
            self._reasons[name] = reason("LIMIT", "local", f"{name} is {limit}.")
            self.log(name, limit)
        return self._reasons[name]

    def log(self, name: str, limit: int) -> None:
        """Say that a limit was reached, for the first time.

        Args:
            name: The limit's field of the configuration.
            limit: Its value.
        """
        text = "the limit %s = %d is reached; from now on this is counted, not logged"
        log.warning(text, name, limit)


class _Counted(AbstractContextManager[None]):
    """A negotiation that lasts; a generator would take five times as much memory."""

    __slots__ = ("_admission", "_host")

    def __init__(self, admission: Admission, host: str | None) -> None:
        self._admission = admission
        self._host = host

    def __enter__(self) -> None:
        self._admission.begin(self._host)

    def __exit__(self, *_: object) -> None:
        self._admission.end(self._host)


def _is_here(host: str) -> bool:
    target = endpoint((host, 0))
    return target is not None and is_local(target)
