"""The programs in the kernel of this machine, where it takes them."""

from __future__ import annotations

import pytest

from tests.discovery.option.real_cases import BARE, CASES
from tests.discovery.option.room import missing, run_case

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


@pytest.fixture(autouse=True, scope="module")
def _able():
    if missing():
        pytest.skip(missing())


@pytest.mark.parametrize("name", CASES)
def test_attached(name):
    run_case(CASES[name])


@pytest.mark.parametrize("name", BARE)
def test_attaching(name):
    run_case(BARE[name], attached=False)
