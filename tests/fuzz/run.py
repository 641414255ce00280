"""Run one fuzz target: a program, because libFuzzer ends the process by itself.

    python tests/fuzz/run.py clc --runs 100000           coverage-guided (atheris)
    python tests/fuzz/run.py clc --input e2d4c3d9        one input, in hexadecimal
    python tests/fuzz/run.py clc --runs 100000 --blind   seeded mutations, any Python
    python tests/fuzz/run.py clc --runs 100000 --grow    keep in the tree what is found
    python tests/fuzz/run.py clc --shrink                keep only what it takes
    python tests/fuzz/run.py clc --keep e2d4c3d9         keep one that showed a fault

The seed of a run is printed; the same seed gives the same run. An input that shows a
fault is printed as hexadecimal, with the command that repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import random
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECONDS_AN_INPUT = 20
MEBIBYTES = 2048
GARBAGE = 50_000
"""Objects that may be made before the young ones are looked at."""


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
    parser.add_argument("--shrink", action="store_true", help="minimise the corpus")
    parser.add_argument("--keep", metavar="HEX", help="put an input into the corpus")
    # libFuzzer calls this program itself when it merges, with options of its own.
    options, more = parser.parse_known_args()
    _make_importable()
    if more:
        return merge(options.target, more)
    if options.shrink:
        return shrink(options.target)
    if options.keep is not None:
        return keep(options.target, bytes.fromhex(options.keep))
    if options.input is not None:
        data = bytes.fromhex("" if options.input == "-" else options.input)
        from tests.fuzz import kit

        kit.load(options.target).run(data)
        say("no fault")
        return 0
    if options.blind:
        return blind(options.target, options.runs, options.seed)
    return guided(options.target, options.runs, options.seed, grow=options.grow)


def keep(name: str, data: bytes) -> int:
    """Put an input into a target's corpus."""
    from tests.fuzz import kit

    folder = kit.CORPUS / kit.load(name).name
    folder.mkdir(exist_ok=True, parents=True)
    (folder / kit.file_name(data)).write_bytes(data)
    return 0


def merge(name: str, arguments: list[str]) -> int:
    """Do what libFuzzer asks for; it ends the process."""
    atheris, _, target = _instrumented(name)
    # It puts this in front of its own options, for a shell.
    program = f"{sys.executable} {Path(__file__).resolve()} {name}"
    atheris.Setup([program, *arguments], target.run)
    atheris.Fuzz()
    return 0


def shrink(name: str) -> int:
    """Leave in a corpus only what it takes to reach all that it reaches."""
    from tests.fuzz import kit

    kept = kit.CORPUS / name
    with tempfile.TemporaryDirectory() as scratch:
        needed = Path(scratch) / "needed"
        needed.mkdir()
        command = [sys.executable, __file__, name, "-merge=1", str(needed), str(kept)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        found = list(needed.iterdir())
        if done.returncode or not found:
            say("nothing was merged")
            return 1
        names = {path.name for path in found}
        for path in kept.iterdir():
            if path.name not in names:
                path.unlink()
    say(f"{len(names)} inputs are left")
    return 0


def _instrumented(name: str) -> tuple[Any, Any, Any]:
    """Give atheris, the kit, and a target whose library reports its coverage."""
    atheris: Any = importlib.import_module("atheris")  # ships no types
    # What plays the peer is no target: its coverage would only lead astray, and cost.
    own = ["pysmc.testing"]
    with atheris.instrument_imports(include=["pysmc", "smcproto"], exclude=own):
        from tests.fuzz import kit

        target = kit.load(name)
    return atheris, kit, target


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
    atheris, kit, target = _instrumented(name)
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
        # Endpoints are rings of objects: looking at all that is there for each few
        # of them costs more than they do.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE, 10, 10)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
