"""Run an unmodified Python program on the pysmc event loop.

Every loop that the program makes through asyncio's own ways is a pysmc loop, also when
it calls ``asyncio.run`` itself. A program that names another loop (uvloop, or
uvicorn's ``--loop uvloop``) keeps that one.

Source: CPython's asyncio.events (policy and ``new_event_loop``) and runpy.
"""

from __future__ import annotations

import asyncio
import builtins
import importlib.util
import os
import runpy
import sys
import types
import warnings
import zipfile
from importlib.machinery import SourceFileLoader
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
    parser.add_argument(
        "program",
        metavar="SCRIPT|MODULE",
        nargs="?",
        help="a file, a folder or zip file with __main__.py, or a module",
    )
    parser.add_argument(
        "arguments", metavar="ARGS", nargs="...", help="what the program gets"
    )


def command(options: argparse.Namespace) -> int:
    """Put the loop in place, then become the program."""
    if options.require:
        # The environment, so that processes which the program starts know it too.
        os.environ["PYSMC_FALLBACK"] = "require"
    try:
        pysmc.Config.from_env()
    except ValueError as error:
        return _refuse(str(error))
    if options.program is None:
        return _refuse("name a script, or a module after -m")
    install_loop()
    sys.argv = [options.program, *options.arguments]
    if options.is_module:
        return _run_module(options.program)
    return _run_script(options.program)


def _refuse(text: str) -> int:
    print(f"pysmc run: {text}", file=sys.stderr)
    return 2


def _run_module(name: str) -> int:
    if name.startswith("."):
        return _refuse(f"a module's whole name is wanted, {name!r} is relative")
    # As `python -m` does, so that modules beside the caller are found.
    _put_first(Path.cwd())
    try:
        is_there = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if not name.startswith(f"{error.name}."):
            raise  # a parent package exists, but something that it imports does not
        is_there = False
    except ValueError:
        is_there = False  # the name is empty
    if not is_there:
        return _refuse(f"there is no module {name!r}")
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


def _run_script(name: str) -> int:
    script = Path(name)
    if not script.exists():
        return _refuse(f"there is no file {name!r}")
    if script.is_dir() and not any(script.glob("__main__.py*")):
        return _refuse(f"{name!r} is a folder without a file __main__.py")
    if script.is_dir() or script.suffix == ".pyc" or zipfile.is_zipfile(script):
        # For folders and zip files runpy puts them first in sys.path itself.
        _drop_first()
        runpy.run_path(name, run_name="__main__")
        return 0
    _put_first(script.resolve().parent)
    _become(str(script.absolute()))
    return 0


def _become(path: str) -> None:
    """Execute a source file as ``__main__``, with what it finds there under Python.

    runpy.run_path would change ``sys.argv[0]`` and keep ``__file__`` relative, and its
    ``__main__`` ends before the functions that the program left to atexit.
    """
    loader = SourceFileLoader("__main__", path)
    module = types.ModuleType("__main__")
    module.__file__ = path
    module.__loader__ = loader
    module.__dict__.update(__builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = module
    exec(loader.source_to_code(loader.get_data(path), path), module.__dict__)


def _put_first(folder: Path) -> None:
    """Put a folder in the place of the one that Python put first for us."""
    _drop_first()
    if not sys.flags.safe_path:
        sys.path.insert(0, str(folder))


def _drop_first() -> None:
    if not sys.flags.safe_path:
        del sys.path[:1]


def install_loop() -> None:
    """Make pysmc's loop the one that asyncio makes by default, in this process.

    For this command only: a library that did this on import would surprise strangers.
    """
    asyncio.SelectorEventLoop = pysmc.Loop  # type: ignore[assignment]
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
