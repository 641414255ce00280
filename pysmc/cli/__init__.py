"""The command line: one subcommand a file, exit codes that mean something.

Exit codes: 0 good, 1 the thing asked about is not so, 2 usage. With ``--json`` a
subcommand prints one JSON object on standard output and nothing else there.

Source: ``design.md``'s public surface; conventions of smc-tools where they exist.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from pysmc._version import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

SUBCOMMANDS = ("run", "demo", "decode", "probe", "doctor", "option", "bench")
"""Each is a module with ``HELP``, ``add_arguments`` and ``command``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: Without the program's name; ``sys.argv[1:]`` by default.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="pysmc",
        description="SMC-R in user space: Shared Memory Communications over RDMA for"
        " asyncio services, with plain TCP where the peer cannot do more.",
    )
    parser.add_argument("--version", action="version", version=f"pysmc {__version__}")
    commands = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND")
    for name in SUBCOMMANDS:
        module = import_module(f"pysmc.cli.{name}")
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=(module.__doc__ or "").split("\n\n")[0],
        )
        module.add_arguments(sub)
        sub.set_defaults(command=module.command)
    options = parser.parse_args(arguments)
    if options.subcommand is None:
        parser.print_help(sys.stderr)
        return 2
    if options.subcommand == "run":
        return int(options.command(options))  # the program's exceptions are its own
    try:
        return int(options.command(options))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; do not complain at exit either.
        sys.stderr.close()
        return 141
