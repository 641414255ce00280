"""The eBPF programs for the SMC option, in the guest's kernel."""

from __future__ import annotations

import pytest

from pysmc.discovery.option import (  # noqa: F401  - loaded before the fork
    faults,
    install,
    pins,
    trial,
)
from tests.discovery.option.real_cases import BARE, CASES
from tests.discovery.option.room import run_case

EVERY_RUN = (
    "matrix_ipv4",
    "matrix_ipv6",
    "matrix_mapped",
    "syn_cookies",
    "fast_open",
    "beside_the_mark",
    "stacked",
    "detached_while_open",
    "without_any_privilege",
)
EVERY_RUN_BARE = (
    "others_are_untouched",
    "beside_a_foreign_program",
    "attach_with_two_capabilities",
)


def run(name: str) -> None:
    install.detach()  # what an earlier scenario attached to the root of all cgroups
    if name in BARE:
        run_case(BARE[name], attached=False)
    else:
        run_case(CASES[name])


@pytest.mark.lab(seconds=40)
def test_the_programs_do_in_this_kernel_what_they_do_elsewhere():
    for name in EVERY_RUN + EVERY_RUN_BARE:
        run(name)


@pytest.mark.lab_long(seconds=60)
@pytest.mark.parametrize(
    "name", sorted({*CASES, *BARE}.difference(EVERY_RUN, EVERY_RUN_BARE))
)
def test_the_rest(name):
    run(name)
