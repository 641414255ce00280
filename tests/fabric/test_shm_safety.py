"""The page on hostile peers names tests that exist, and every kind of attack."""

from __future__ import annotations

import re
from pathlib import Path

from tests.fabric.hostile_lies import KINDS

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "explanation" / "shared-memory-safety.md"


def test_the_tests_that_are_named_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 30
    missing = [
        f"{path}::{name}"
        for path, name in named
        if name and f"def {name}(" not in (TESTS / path).read_text(encoding="utf-8")
    ]
    assert missing == []
    assert all((TESTS / path).exists() for path, _ in named)


def test_every_kind_of_attack_is_explained() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"`{kind}`" not in page] == []
