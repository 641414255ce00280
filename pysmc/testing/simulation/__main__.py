"""Play one drawn world, or some: ``python -m pysmc.testing.simulation --seed 7``.

Prints what the world is, what happened if that is asked for, and how it went. The exit
status is 1 when something was broken.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import TYPE_CHECKING

from pysmc.testing.simulation.swarm import draw, play

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Play what the command line names.

    Args:
        arguments: In place of the command line's.

    Returns:
        The exit status: 1 when something was broken.
    """
    parser = argparse.ArgumentParser(prog="python -m pysmc.testing.simulation")
    parser.add_argument("--seed", type=int, required=True, help="the first world")
    parser.add_argument("--count", type=int, default=1, help="how many, one by default")
    parser.add_argument("--trace", action="store_true", help="tell what happens")
    options = parser.parse_args(arguments)
    logging.disable()  # faults are logged, and here they are wanted
    write, status = sys.stdout.write, 0
    try:
        for seed in range(options.seed, options.seed + options.count):
            spec = draw(seed)
            outcome = play(spec, trace=options.trace)
            if outcome.trace:
                write(spec.describe() + "\n" + "\n".join(outcome.trace) + "\n")
            verdict = "good" if outcome.is_good else "BROKEN"
            write(f"seed {seed}: {verdict}, {outcome}\n")
            if not outcome.is_good:
                status = 1
                write("".join(f"  {problem}\n" for problem in outcome.problems))
    finally:
        logging.disable(logging.NOTSET)
    return status


if __name__ == "__main__":
    sys.exit(main())
