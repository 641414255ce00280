"""Run an unmodified Python program on the pysmc event loop.

Every loop that the program makes through asyncio's own ways is a pysmc loop, also when
it calls ``asyncio.run`` itself. A program that names another loop (uvloop, or
uvicorn's ``--loop uvloop``) keeps that one.

Source: CPython's asyncio.events (policy and ``new_event_loop``) and runpy.
"""

from __future__ import annotations

import asyncio
import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pysmc

if TYPE_CHECKING:
    import argparse

HELP = "run an unmodified Python program on the pysmc loop"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; everything behind the program belongs to it."""
    parser.usage = "pysmc run [-h] [--require] (SCRIPT | -m MODULE) [ARGS ...]"
    parser.add_argument(
        "--require",
        action="store_true",
        help="fail a connection that cannot be SMC-R instead of using TCP",
    )
    parser.add_argument(
        "-m",
        dest="is_module",
        action="store_true",
        help="what follows is a module's name, as for python -m",
    )
    parser.add_argument("program", metavar="SCRIPT|MODULE")
    parser.add_argument("arguments", metavar="ARGS", nargs="...")


def command(options: argparse.Namespace) -> int:
    """Put the loop in place, then become the program."""
    if options.require:
        # The environment, so that processes which the program starts know it too.
        os.environ["PYSMC_FALLBACK"] = "require"
    try:
        pysmc.Config.from_env()
    except ValueError as error:
        print(f"pysmc run: {error}", file=sys.stderr)
        return 2
    script = Path(options.program)
    if not options.is_module and not script.exists():
        print(f"pysmc run: there is no file {options.program!r}", file=sys.stderr)
        return 2
    install_loop()
    sys.argv = [options.program, *options.arguments]
    if options.is_module:
        # As `python -m` does, so that modules beside the caller are found.
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(options.program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(script.resolve().parent))
        runpy.run_path(options.program, run_name="__main__")
    return 0


def install_loop() -> None:
    """Make pysmc's loop the one that asyncio makes by default, in this process.

    For this command only: a library that did this on import would surprise strangers.
    """
    asyncio.SelectorEventLoop = pysmc.Loop  # type: ignore[misc]
    if sys.version_info >= (3, 14):
        asyncio.events.new_event_loop = pysmc.new_event_loop
        asyncio.new_event_loop = pysmc.new_event_loop
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)

        class Policy(asyncio.DefaultEventLoopPolicy):
            """The stock policy, but for the loop that it makes."""

            def new_event_loop(self) -> asyncio.AbstractEventLoop:
                return pysmc.new_event_loop()

        asyncio.set_event_loop_policy(Policy())
