"""The words for connections that are TCP before anybody was asked."""

from __future__ import annotations

import pytest

from pysmc.discovery import findings
from pysmc.reasons import Reason


@pytest.mark.parametrize("name", sorted(set(findings.__all__) - {"setup_missing"}))
def test_every_one_is_a_constant_with_words(name: str) -> None:
    found = getattr(findings, name)
    assert isinstance(found, Reason)
    assert found.text.endswith(".")


def test_what_is_missing_stands_in_the_text() -> None:
    missing = findings.setup_missing("No Unix socket.")
    assert (missing.name, missing.side) == ("SETUP_MISSING", "local")
    assert "No Unix socket." in missing.text
