"""All cases with a real kernel: on the host, and in the guests of the lab."""

from __future__ import annotations

from tests.discovery.option import real_handshakes, real_setups
from tests.discovery.option.cases import BARE, CASES

__all__ = ["BARE", "CASES", "real_handshakes", "real_setups"]
