"""The kit with which pysmc is tested, for whoever wants to test with it.

Here is `check_device`, which holds a fabric to its contract. The rest is imported by
name, because some of it needs a package of its own:

* ``pair``: two cores back to back; ``states``, ``messages`` and ``deliver``: any
  message to an endpoint in any state, and what it does
* ``loops``: a loop on the simulated fabric; ``simulation``: processes on a virtual
  clock; ``invariants``: what must hold in every loop
* ``strategies`` and ``machines`` (hypothesis), ``authority`` (cryptography)

Imports nothing of a test framework; docs/reference/testing.md shows each of them.
Source of the fabric's rules: pysmc.fabric.base.
"""

from __future__ import annotations

from pysmc.testing.conformance import CHECKS, ConformanceFailure, check_device

__all__ = ["CHECKS", "ConformanceFailure", "check_device"]
