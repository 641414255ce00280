"""The command line of the lab: a shell in the guest, or one command."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from lab import kernel, machine, needs
from lab.errors import GuestDied, LabError
from lab.places import ROOT, new_results

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; gives the exit code (that of the command in the guest)."""
    parser = argparse.ArgumentParser(prog="run_lab.py", description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    run = commands.add_parser("run", help="run a command in the guest")
    run.add_argument("--seconds", type=float, default=170, help="limit for the command")
    run.add_argument("words", nargs="+", help="the command, for a shell in the tree")
    shell = commands.add_parser("shell", help="a shell in the guest")
    fetch = commands.add_parser("kernel", help="fetch the kernel, or tell which it is")
    fetch.add_argument("--newest", action="store_true", help="ask the package index")
    for one in (run, shell, fetch):
        one.add_argument("--linux", choices=kernel.SERIES, default=kernel.USUAL)
    given = parser.parse_args(arguments)
    try:
        if given.what == "kernel":
            return _kernel(given.linux, is_newest_wanted=given.newest)
        needs.check()
        if given.what == "shell":
            return _shell(given.linux)
        return _run(" ".join(given.words), given.seconds, given.linux)
    except (LabError, TimeoutError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130


def _kernel(series: str, *, is_newest_wanted: bool) -> int:
    found = kernel.get(series, is_newest_wanted=is_newest_wanted)
    print(f"{found.version}  {found.folder}")
    return 0


def _shell(series: str) -> int:
    with machine.only_one():
        results = new_results()
        setup = machine.prepare(results, is_shell=True, series=series)
        print(f"Results: {results}", file=sys.stderr)
        with machine.Machine(setup, 24 * 3600) as guest:
            guest.join()
    return 0


def _run(command: str, seconds: float, series: str) -> int:
    job = f'cd "{ROOT}"\nexport PATH="{sys.prefix}/bin:$PATH"\n{command}\n'
    with machine.only_one():
        results = new_results()
        (results / "job").write_text(job, encoding="utf-8")
        setup = machine.prepare(results, series=series)
        with machine.Machine(setup, seconds + machine.BOOT_WAIT) as guest:
            guest.wait("ready", machine.BOOT_WAIT)
            code = _follow(guest, results, seconds)
    print(f"lab: results are in {results}", file=sys.stderr)
    return code


def _follow(guest: machine.Machine, results: Path, seconds: float) -> int:
    """Show the command's output as it comes; gives its exit code."""
    end = time.monotonic() + seconds
    output = results / "output"
    shown = 0
    while True:
        is_over = (results / "status").exists() or not guest.is_running
        if output.exists():
            with output.open("rb") as file:
                file.seek(shown)
                fresh = file.read()
            shown += len(fresh)
            sys.stdout.buffer.write(fresh)
            sys.stdout.flush()
        if is_over:
            break
        if time.monotonic() > end:
            text = "the command did not end within {:g} s"
            raise GuestDied(text, seconds)
        time.sleep(0.1)
    if not (results / "status").exists():
        text = "the guest has ended; {}"
        raise GuestDied(text, guest.last_words())
    return int((results / "status").read_text(encoding="ascii"))
