"""Run one fuzz target: a program, because libFuzzer ends the process by itself.

    python tests/fuzz/run.py clc --runs 100000           coverage-guided (atheris)
    python tests/fuzz/run.py clc --input e2d4c3d9        one input, in hexadecimal
    python tests/fuzz/run.py clc --runs 100000 --blind   seeded mutations, any Python
    python tests/fuzz/run.py clc --runs 100000 --grow    keep in the tree what is found

The seed of a run is printed; the same seed gives the same run. An input that shows a
fault is printed as hexadecimal, with the command that repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import random
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS_AN_INPUT = 20
MEBIBYTES = 2048


def _make_importable() -> None:
    """Let ``tests.fuzz`` be imported, whatever else calls itself ``tests``."""
    sys.path[:0] = [str(ROOT), str(ROOT / "proto")]
    for name, folder in (("tests", HERE.parent), ("tests.fuzz", HERE)):
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module


def say(text: str) -> None:
    """Print at once: libFuzzer prints past Python's buffers."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", metavar="HEX", help="one input; - for an empty one")
    parser.add_argument("--blind", action="store_true", help="without atheris")
    parser.add_argument("--grow", action="store_true", help="add to the corpus")
    options = parser.parse_args()
    _make_importable()
    if options.input is not None:
        data = bytes.fromhex("" if options.input == "-" else options.input)
        from tests.fuzz import kit

        kit.load(options.target).run(data)
        say("no fault")
        return 0
    if options.blind:
        return blind(options.target, options.runs, options.seed)
    return guided(options.target, options.runs, options.seed, grow=options.grow)


def blind(name: str, runs: int, seed: int) -> int:
    """Try seeded mutations of what is known, without looking at coverage."""
    from tests.fuzz import kit

    target = kit.load(name)
    seeds = target.seeds() + kit.corpus(name)
    inputs = kit.mutations(seeds, target.most_bytes, random.Random(seed))
    for _ in range(runs):
        data = next(inputs)
        _run_or_tell(kit, target, data)
    say(f"executed: {runs}")
    return 0


def _run_or_tell(kit: Any, target: Any, data: bytes) -> None:
    try:
        target.run(data)
    except BaseException:
        whole = target.told(data)
        say(f"INPUT: {whole.hex()}\nREPEAT: {kit.reproduce(target.name, whole)}")
        sys.stdout.flush()
        raise


def guided(name: str, runs: int, seed: int, *, grow: bool) -> int:
    """Let libFuzzer find inputs that reach new lines; it ends the process."""
    atheris: Any = importlib.import_module("atheris")  # ships no types

    with atheris.instrument_imports(include=["pysmc", "smcproto"]):
        from tests.fuzz import kit

        target = kit.load(name)
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders = [scratch / "found", scratch / "seeds"]
        for folder in folders:
            folder.mkdir()
        for data in target.seeds():
            (folders[1] / kit.file_name(data)).write_bytes(data)
        kept = kit.CORPUS / name
        kept.mkdir(exist_ok=True, parents=True)
        # libFuzzer leaves by _exit and cleans up nothing: its finds lie in the first
        # folder, which is the tree's own when the corpus shall grow.
        order = [kept, folders[1]] if grow else [folders[0], folders[1], kept]
        arguments = [
            sys.argv[0],
            *map(str, order),
            f"-runs={runs}",
            f"-seed={seed}",
            f"-max_len={target.most_bytes}",
            f"-timeout={SECONDS_AN_INPUT}",
            f"-rss_limit_mb={MEBIBYTES}",
            f"-artifact_prefix={scratch}/",
            "-print_final_stats=1",
        ]

        def one(data: bytes) -> None:
            _run_or_tell(kit, target, data)

        atheris.Setup(arguments, one)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
