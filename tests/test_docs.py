"""The docs say what the code says: tables, links, examples, names."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from importlib import import_module
from pathlib import Path

import pytest

import doc_tables
from pysmc.cli import SUBCOMMANDS
from pysmc.config import Config
from pysmc.reasons import REASONS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted(path.name for path in ROOT.glob("*.md")),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)[^)]*\)")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
FIELDS = {field.name for field in dataclasses.fields(Config)}
OF_THE_LAB = {
    "LAB",
    *(f"LAB_{name}" for name in ("CACHE", "KERNEL", "MEMORY_MB", "FOLDER")),
}
VARIABLE = re.compile(r"\bPYSMC_([A-Z_]*[A-Z])")


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def test_tables_are_what_the_code_says() -> None:
    assert doc_tables.stale() == [], "run: make docs"


def test_every_setting_and_every_reason_is_documented() -> None:
    config = read("docs/reference/config.md")
    reasons = read("docs/reference/reasons.md")
    texts = doc_tables.field_texts()
    assert texts.keys() == FIELDS, "a field of Config without a docstring"
    assert [name for name in FIELDS if f"| `{name}` |" not in config] == []
    assert [n for n in REASONS if f"| `{n}` |" not in reasons] == []


def test_every_limit_is_explained_and_shown_by_a_test_that_exists() -> None:
    page = read("docs/reference/limits.md")
    limits = {name for name in FIELDS if name.startswith("max_")} - {"max_links"}
    assert [name for name in sorted(limits) if f"`{name}`" not in page] == []
    shown = re.findall(r"`(\w+/test_\w+\.py)(?:::(\w+))?`", page)
    assert len(shown) > 20
    for path, name in shown:
        assert f"def {name}" in read(f"tests/{path}")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    dead = [to for to in LINK.findall(read(page)) if not (folder / to).exists()]
    assert dead == []


@pytest.mark.parametrize("page", PAGES)
def test_examples_are_python(page: str) -> None:
    for example in PYTHON.findall(read(page)):
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        compile(example, page, "exec", flags=flags, dont_inherit=True)


@pytest.mark.parametrize("page", PAGES)
def test_variables_that_are_named_exist(page: str) -> None:
    names = {name.upper() for name in FIELDS} | OF_THE_LAB
    assert set(VARIABLE.findall(read(page))) - names == set()


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_every_option_of_the_command_line_is_documented(subcommand: str) -> None:
    sections = re.split(r"^## ", read("docs/reference/cli.md"), flags=re.MULTILINE)
    (section,) = (text for text in sections if text.startswith(f"{subcommand}\n"))
    parser = argparse.ArgumentParser(add_help=False)
    import_module(f"pysmc.cli.{subcommand}").add_arguments(parser)
    missing = [
        o for o in re.findall(r"--[a-z]+", parser.format_help()) if o not in section
    ]
    assert missing == []
