"""Ports for programs that cannot choose one and tell it."""

from __future__ import annotations

import itertools
import os
import socket
from pathlib import Path

__all__ = ["free_port"]

HOST = "127.0.0.1"
LOWEST = 10_000
BELOW = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
"""From here on the kernel chooses: a port that is free now may be anybody's next."""

_numbers = itertools.count(37 * os.getpid())


def free_port() -> int:
    """Find a TCP port of this host that is free, and that nobody is given by chance.

    Other processes that test here begin with other numbers.
    """
    for number in _numbers:
        port = LOWEST + number % (BELOW - LOWEST)
        try:
            with socket.create_server((HOST, port)):
                return port
        except OSError:
            continue
    raise AssertionError
