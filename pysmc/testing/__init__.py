"""For whoever builds a fabric or embeds the core: the contracts as checks.

Imports nothing of a test framework. Source of the rules: pysmc.fabric.base.
"""

from __future__ import annotations

from pysmc.testing.conformance import CHECKS, ConformanceFailure, check_device

__all__ = ["CHECKS", "ConformanceFailure", "check_device"]
