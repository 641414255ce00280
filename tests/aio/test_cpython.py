"""The private names of CPython that we rely on, on every Python that is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pysmc.aio import cpython
from tests.aio.pythons import VERSIONS, need

# Runs on its own: another Python need not have anything of ours installed.
LOOK = """
import importlib, inspect, json, sys

def find(dotted):
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ImportError(dotted)

problems = []
for name, wanted in json.load(sys.stdin).items():
    try:
        found = find(name)
    except (ImportError, AttributeError) as error:
        problems.append(f"{name}: {error}")
        continue
    if wanted:
        parameters = list(inspect.signature(found).parameters)
        if inspect.isclass(found):
            parameters.insert(0, "self")
        problems += [f"{name} has no {p}: {parameters}" for p in wanted
                     if p not in parameters]
print(json.dumps([list(sys.version_info[:2]), problems]))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_exists(version) -> None:
    program = need(version)
    done = subprocess.run(
        [program, "-I", "-c", LOOK],
        input=json.dumps(cpython.PRIVATE_NAMES),
        capture_output=True,
        text=True,
        check=False,
    )
    if "No module named" in done.stderr or "not found" in done.stderr:
        pytest.skip(f"python{version} does not start here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found, problems = json.loads(done.stdout)
    assert ".".join(map(str, found)) == version
    assert problems == []


def test_a_missing_name_is_noticed() -> None:
    wrong = {
        "asyncio.no_such_name": [],
        "asyncio.trsock.TransportSocket": ["no_such_parameter"],
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOOK],
        input=json.dumps(wrong),
        capture_output=True,
        text=True,
        check=True,
    )
    problems = json.loads(done.stdout)[1]
    assert len(problems) == 2
    assert "no_such_name" in problems[0]
    assert "no_such_parameter" in problems[1]


def test_no_private_name_of_asyncio_is_used_elsewhere() -> None:
    """What is overridden or called with an underscore stands in the table."""
    listed = {name.rsplit(".", 1)[1] for name in cpython.PRIVATE_NAMES}
    room = Path(cpython.__file__).parent
    for path in room.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in ("_make_socket_transport", "_accept_connection2", "_attach",
                     "_start_serving", "_stop_serving", "_transports", "_selector",
                     "_ensure_resolved", "_add_reader", "_sock_connect"):  # fmt: skip
            if f".{name}(" in text or f"def {name}(" in text:
                assert name in listed, f"{path.name}: {name}"


@pytest.mark.parametrize("keeps", [False, True])
def test_servers_of_either_kind_are_told(monkeypatch, keeps) -> None:
    monkeypatch.setattr(cpython, "_SERVER_KEEPS_TRANSPORTS", keeps)
    told = []

    class Server:
        def _attach(self, *arguments) -> None:
            told.append(("attach", *arguments))

        def _detach(self, *arguments) -> None:
            told.append(("detach", *arguments))

    transport = object()
    cpython.attach(Server(), transport)
    cpython.detach(Server(), transport)
    arguments = (transport,) if keeps else ()
    assert told == [("attach", *arguments), ("detach", *arguments)]
