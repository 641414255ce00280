"""All checks of the doctor, in the order in which it looks."""

from __future__ import annotations

from pysmc.cli.checks import (
    discovery,
    kernel_smc,
    shm,
    system,
    verbs,
    verbs_host,
    verbs_peer,
)

__all__ = ["CHECKS", "FABRICS"]

CHECKS = (
    *system.CHECKS,
    *shm.CHECKS,
    *discovery.CHECKS,
    *verbs_host.CHECKS,
    *verbs.CHECKS,
    *kernel_smc.CHECKS,
    *verbs_peer.CHECKS,
)
"""Every check; what a later one needs comes first."""

FABRICS = ("shm", "verbs")
"""The fabrics that get a verdict: their checks begin with their name and a dot."""
