"""Every fabric keeps the contract; and the checks notice a fabric that does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pysmc.testing.conformance import CHECKS, REMOTE_CHECKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from pysmc.testing.conformance import MakePair

    Check = Callable[[MakePair], None]

by_name = pytest.mark.parametrize(
    "check", [check for _, check in CHECKS], ids=[name for name, _ in CHECKS]
)


@by_name
def test_shm_in_one_process(check: Check, make_shm_pair: MakePair) -> None:
    check(make_shm_pair)


@by_name
def test_sim(check: Check, make_sim_pair: MakePair) -> None:
    check(make_sim_pair)


@by_name
def test_verbs_on_an_imitated_library(check: Check, make_verbs_pair: MakePair) -> None:
    check(make_verbs_pair)


@pytest.mark.parametrize(
    "check",
    [check for name, check in CHECKS if name in REMOTE_CHECKS],
    ids=[name for name, _ in CHECKS if name in REMOTE_CHECKS],
)
def test_shm_between_processes(check: Check, make_remote_pair: MakePair) -> None:
    check(make_remote_pair)
