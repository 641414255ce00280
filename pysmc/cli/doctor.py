"""Look at this machine: which fabric and which discovery works here, and why not.

Ordered checks, each with what was seen, what it means and what to do. Nothing is
changed on the machine, and nothing is sent to another host unless --peer asks for it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from pysmc.cli.checks.check import Report, Status
    from pysmc.cli.checks.machine import Machine

HELP = "look at this machine: what works, why not, and what to do"

COLUMNS_MOST = 100
"""Longer lines are hard to read."""
COLOURS = {"ok": "32", "warn": "33", "fail": "31", "skip": "2"}
"""SGR codes (ECMA-48): green, yellow, red, faint."""
FABRIC_WORDS = {"ok": "works", "warn": "works, but", "fail": "does not work"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--peer",
        default="",
        metavar="HOST",
        help="also tell which RDMA device would carry a connection to this host, and"
        " whether it can be reached",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def command(options: argparse.Namespace) -> int:
    """Run all checks and print them; 0 when at least one fabric works, 1 else."""
    from pysmc.cli.checks.machine import Machine

    # What a check finds is in its report, and not on standard error too.
    logging.getLogger("pysmc").addHandler(logging.NullHandler())
    return diagnose(Machine(peer=options.peer), as_json=options.json)


def diagnose(machine: Machine, *, as_json: bool) -> int:
    """Examine a machine and print what was found.

    Args:
        machine: What to look at.
        as_json: Print one JSON object instead of lines for people.

    Returns:
        The exit code.
    """
    from pysmc.cli.checks.catalogue import CHECKS, FABRICS
    from pysmc.cli.checks.check import Status, examine, verdict

    reports = examine(machine, CHECKS)
    fabrics = {name: verdict(name, reports) for name in FABRICS}
    works = any(status in {Status.OK, Status.WARN} for status in fabrics.values())
    if as_json:
        checks = [report.as_json() for report in reports]
        words = {name: str(status) for name, status in fabrics.items()}
        print(json.dumps({"checks": checks, "fabrics": words}))
    else:
        columns = min(shutil.get_terminal_size().columns, COLUMNS_MOST)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print("\n".join(render(reports, fabrics, columns, colour=colour)))
    return 0 if works else 1


def render(
    reports: Sequence[Report],
    fabrics: dict[str, Status],
    columns: int,
    *,
    colour: bool,
) -> list[str]:
    """Make the lines for people: each check, then the verdict.

    Args:
        reports: What was found, in order.
        fabrics: The verdict on each fabric.
        columns: How long a line may be.
        colour: Whether the terminal shows colours.
    """
    width = max(len(report.name) for report in reports) + 2
    lines = []
    for report in reports:
        head = f"{_painted(report.status, colour=colour)}  {report.name:<{width}}"
        texts = [report.seen, report.means]
        if report.remedy:
            texts.append(f"-> {report.remedy}")
        rest = " " * (6 + width)
        below = [
            line
            for text in texts
            if text
            for line in textwrap.wrap(
                text,
                max(columns - len(rest), 30),
                subsequent_indent="   " if text.startswith("->") else "",
                break_long_words=False,
                break_on_hyphens=False,
            )
        ]
        lines.append(f"{head}{below[0]}")
        lines += [f"{rest}{line}" for line in below[1:]]
    lines.append("")
    for name, status in fabrics.items():
        lines.append(_verdict_line(name, status, reports, colour=colour))
    return lines


def _painted(status: Status, *, colour: bool) -> str:
    word = f"{status:<4}"
    return f"\033[{COLOURS[status]}m{word}\033[0m" if colour else word


def _verdict_line(
    fabric: str, status: Status, reports: Sequence[Report], *, colour: bool
) -> str:
    """Say in one line whether a fabric works, and which check speaks against it."""
    because = [
        report.name
        for report in reports
        if report.name.startswith(f"{fabric}.") and report.status == status
    ]
    words = FABRIC_WORDS.get(status, "was not looked at")
    if status in {"fail", "warn"}:
        words += f": see {', '.join(because)}"
    return f"{_painted(status, colour=colour)}  {fabric} {words}"
