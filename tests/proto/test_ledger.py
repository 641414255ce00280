"""The ledger of requirements: what it calls met names a test that exists."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECTION = re.compile(
    r"RFC 7609 (A\.\d(\.\d)?|section \d(\.\d){1,2})|Linux smc_\w+\.[ch]|Design"
)
TEST_NAME = re.compile(r"\btest_\w+")


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


@pytest.fixture
def rows(proto) -> Any:
    return proto.load_toml("requirements.toml")["requirement"]


def test_every_row_is_complete(rows):
    for row in rows:
        keys = {"id", "section", "words", "status"}
        assert keys <= set(row) <= keys | {"test", "reason"}, row
        assert SECTION.fullmatch(row["section"]), row
        assert row["words"].endswith("."), row
        assert row["status"] in {"met", "excepted", "open"}, row


def test_what_is_met_names_a_test_that_exists(rows):
    met = [row for row in rows if row["status"] == "met"]
    assert met
    for row in met:
        path, _, name = row["test"].partition("::")
        assert (ROOT / path).is_file(), row
        assert name in functions_of(path), row


def test_what_is_not_met_says_why(rows):
    for row in rows:
        if row["status"] != "met":
            assert row["reason"], row
            assert "test" not in row, row


def test_tests_named_in_reasons_exist_too(rows):
    known = frozenset().union(
        *(
            functions_of(f"tests/proto/{path.name}")
            for path in Path(__file__).parent.glob("test_*.py")
        )
    )
    for row in rows:
        reason = re.sub(r"tests/\S+", "", row.get("reason", ""))
        for name in TEST_NAME.findall(reason):
            assert name in known, row


def test_the_ledger_has_rows_enough_and_none_twice(rows):
    assert len(rows) >= 40
    for key in ("id", "words"):
        counts = Counter(row[key] for row in rows)
        assert [value for value, count in counts.items() if count > 1] == []


def test_every_section_of_the_formats_is_in_the_ledger(rows):
    sections = {row["section"].removeprefix("RFC 7609 ") for row in rows}
    formats = [f"A.2.{n}" for n in range(1, 6)] + [f"A.3.{n}" for n in range(1, 9)]
    assert set(formats) | {"A.1", "A.4"} <= sections
