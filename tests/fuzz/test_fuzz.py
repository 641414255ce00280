"""Every target takes a great many inputs: coverage-guided, and by seeded mutations.

libFuzzer leaves by itself and takes the process along, so it runs in a child: what it
prints says how many inputs it tried, and how to repeat the one that it stumbled over.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
import sys

import pytest

from tests.fuzz import kit

SMALL, FULL = 100_000, 10_000_000
# A decoder takes some tens of microseconds. Endpoints and loops take up to a
# millisecond, a part of it for the checks behind each step: in every run they get what
# fits into some 20 seconds of a processor, and in the long one a million.
DEAR = {
    "core-messages": (25_000, 1_000_000),
    "core-pair": (15_000, 1_000_000),
    "transport": (SMALL, 1_000_000),
}
BLIND = dict.fromkeys(kit.NAMES, 2_000) | dict.fromkeys(DEAR, 200)
NO_ATHERIS = "needs atheris, which has wheels for Python 3.11: pip install atheris"
has_atheris = importlib.util.find_spec("atheris") is not None
PROGRAM = kit.ROOT / "tests" / "fuzz" / "run.py"
EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)")
CORPUS_FILES, CORPUS_BYTES = 300, 100 * 1024


def fuzz(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the program; gives what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "COVERAGE_PROCESS_START"}
    return subprocess.run(
        [sys.executable, str(PROGRAM), name, *options],
        cwd=kit.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def what_failed(output: str) -> str:
    """Give the input, how to repeat it, and the end of what was printed."""
    told = [
        line for line in output.splitlines() if line.startswith(("INPUT", "REPEAT"))
    ]
    return "\n".join([*told, output[-3000:]])


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not has_atheris, reason=NO_ATHERIS)
@pytest.mark.parametrize("name", kit.NAMES)
def test_guided_inputs_show_no_fault(name, long_run):
    small, full = DEAR.get(name, (SMALL, FULL))
    with long_run(f"fuzz-{name}", small=small, full=full) as run:
        done = fuzz(name, "--runs", str(run.count), "--seed", str(1 + run.first))
        executed = EXECUTED.search(done.stdout)
        if done.returncode or executed is None:
            run.fail(what_failed(done.stdout))
        else:
            assert int(executed[1]) >= run.count
            run.add(inputs=int(executed[1]))


@pytest.mark.parametrize("name", kit.NAMES)
def test_mutated_inputs_show_no_fault(name):
    """The same without atheris, on every Python; fewer, and not guided."""
    target = kit.load(name)
    seeds = target.seeds() + kit.corpus(name)
    inputs = kit.mutations(seeds, target.most_bytes, random.Random(name))
    for data in [*seeds, *(next(inputs) for _ in range(BLIND[name]))]:
        try:
            target.run(data)
        except BaseException as fault:
            fault.add_note(kit.reproduce(name, target.told(data)))
            raise


@pytest.mark.parametrize("name", kit.NAMES)
def test_the_corpus_is_small_and_named_by_its_content(name):
    inputs = kit.corpus(name)
    assert inputs
    assert len(inputs) < CORPUS_FILES
    assert sum(map(len, inputs)) < CORPUS_BYTES
    names = {path.name for path in (kit.CORPUS / name).iterdir()}
    assert names == {kit.file_name(data) for data in inputs}


def test_a_target_that_does_not_exist_is_refused():
    done = fuzz("no-such-target", "--input", "e2d4c3d9")
    assert done.returncode != 0
    assert "KeyError" in done.stdout


def test_one_input_can_be_repeated():
    done = fuzz("clc", "--input", "-")
    assert (done.returncode, done.stdout) == (0, "no fault\n")


def test_mutations_are_the_same_for_the_same_seed():
    seeds = kit.load("clc").seeds()
    one, two = (kit.mutations(seeds, 100, random.Random(7)) for _ in range(2))
    first = [next(one) for _ in range(50)]
    assert first == [next(two) for _ in range(50)]
    assert len(set(first)) > 40
    assert max(map(len, first)) <= 100
