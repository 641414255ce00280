#!/usr/bin/env python3
"""Write the tables of the docs from the code that they are about.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; the
words around it are written by hand. ``make docs`` writes, ``--check`` only compares
(tests/test_docs.py).
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import interop_matrix
from pysmc import config
from pysmc.cli.checks.catalogue import CHECKS, FABRICS
from pysmc.reasons import REASONS

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(
    r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL
)


def field_texts() -> dict[str, str]:
    """Read the docstring under each field of `pysmc.Config` from the source."""
    tree = ast.parse(Path(config.__file__).read_text(encoding="utf-8"))
    (cls,) = (
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    )
    texts = {}
    for node, following in zip(cls.body, cls.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    texts[node.target.id] = " ".join(text.split())
    return texts


def _default(field: Field[object]) -> str:
    if field.default is MISSING:
        return "depends on the machine"
    match field.default:
        case () | "":
            return "(empty)"
        case tuple(items):
            return f"`{','.join(str(item) for item in items)}`"
        case other:
            return f"`{other}`"


def _kind(field: Field[object]) -> str:
    if field.metadata.get("kind") == "wait":
        return "wait"
    is_limit = field.metadata.get("kind") == "int" and field.name.startswith("max_")
    in_design = field.name in {"max_links", "max_connections"}
    return "limit" if is_limit and not in_design else "main"


def config_table(*kinds: str) -> str:
    """Render the fields of the kinds: "main", "wait" or "limit"."""
    texts = field_texts()
    rows = ["| field | default | meaning |", "|---|---|---|"]
    rows += [
        f"| `{field.name}` | {_default(field)} | {texts[field.name]} |"
        for field in fields(config.Config)
        if _kind(field) in kinds
    ]
    return "\n".join(rows)


def reasons_table(*, advice: bool) -> str:
    """Render the table of reasons, with or without what to do."""
    rows = ["| name | code | what happened |", "|---|---|---|"]
    if advice:
        rows = ["| name | code | what happened | what to do |", "|---|---|---|---|"]
    for row in REASONS.values():
        code = "none" if row.code is None else f"`{row.code:08x}`"
        cells = [f"`{row.name}`", code, row.sentence]
        rows.append(f"| {' | '.join(cells + [row.advice] * advice)} |")
    return "\n".join(rows)


def doctor_table(area: str) -> str:
    """Render the checks of an area: "shm", "verbs", or "" for all other ones."""
    rows = [
        "| check | what is looked at | when it is not ok | what to do |",
        "|---|---|---|---|",
    ]
    for item in CHECKS:
        head = item.name.partition(".")[0]
        if area == (head if head in FABRICS else ""):
            cells = [f"`{item.name}`", item.looks_at, item.means, item.remedy]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def long_runs_table() -> str:
    """Render the reports of the long runs, one row each."""
    rows = [
        "| run | commit | cases | failures | minutes of all shards | figures |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "docs/project/long-runs").glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        minutes = report["seconds_of_all_shards"] / 60
        facts = report.get("facts", {})
        figures = "" if isinstance(facts, list) else _figures(facts)
        rows.append(
            f"| [{report['name']}]({path.name}) | `{report['commit'][:9]}` "
            f"| {report['cases']:,} | {report['failures']} | {minutes:.1f} "
            f"| {figures} |"
        )
    return "\n".join(rows)


def _figures(facts: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(facts.items()))


def demands_table(kind: str, section: str | None = None) -> str:
    """Render what is demanded, by section, or what may fail (kinds of the registry)."""
    registry = (ROOT / "tests" / "demands" / "demands.toml").read_text(encoding="utf-8")
    rows = ["| | what it was | what holds | shown by |", "|---|---|---|---|"]
    for row in tomllib.loads(registry)[kind]:
        if section is None or row["section"] == section:
            names = [f"`{name.removeprefix('tests/')}`" for name in row["tests"]]
            shown = [*names, *([f"Later: {row['later']}"] if "later" in row else [])]
            cells = [row["id"], row["was"], row["holds"], "<br>".join(shown)]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


SECTIONS = ("input", "ends", "fallback", "groups", "data", "set-up")

TABLES: dict[str, Callable[[], str]] = {
    "config-main": lambda: config_table("main"),
    "config-waits": lambda: config_table("wait"),
    "config-limits": lambda: config_table("limit"),
    "reasons-short": lambda: reasons_table(advice=False),
    "reasons": lambda: reasons_table(advice=True),
    "faults": lambda: demands_table("fault"),
    **{f"demands-{name}": partial(demands_table, "demand", name) for name in SECTIONS},
    "long-runs": long_runs_table,
    "interop-matrix": interop_matrix.table,
    "doctor-machine": lambda: doctor_table(""),
    **{f"doctor-{name}": partial(doctor_table, name) for name in FABRICS},
}


def render(text: str) -> str:
    """Replace every marked table of a page by what the code says now."""
    return MARKED.sub(
        lambda found: f"{found[1]}{TABLES[found['name']]()}\n{found[3]}", text
    )


def pages() -> list[Path]:
    """List the pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stale() -> list[str]:
    """Name the pages whose tables differ from the code."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    return [
        str(page.relative_to(ROOT))
        for page, text in texts.items()
        if render(text) != text
    ]


def main(arguments: list[str]) -> int:
    """Write the tables, or with ``--check`` name the pages that are stale."""
    names = stale()
    if arguments != ["--check"]:
        for name in names:
            page = ROOT / name
            page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
    print("\n".join(names) or "All tables are as the code says.")
    return 1 if names and arguments == ["--check"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
