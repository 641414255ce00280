"""The how-to page about RDMA, carried out as it stands there, from no device at all."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from doc_recipes import Recipe
from tests.lab.network_faults import DEVICES, no_rdma_device, run

pytestmark = [pytest.mark.lab_long(seconds=150), pytest.mark.timeout(300)]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto" / "rdma.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
SETTINGS = (
    "PYSMC_FABRICS=shm,verbs PYSMC_UEIDS=PROD.EAST PYSMC_DISCOVERY=local,static"
    " PYSMC_PEERS=10.0.0.0/24:8000"
)


def await_listener(port: int) -> None:
    """Wait until somebody listens, without connecting: that would be a peer."""
    deadline = time.monotonic() + 60
    words = f":{port:04X} 00000000:0000 0A"
    while words not in Path("/proc/net/tcp").read_text(encoding="ascii"):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.1)


def rest(program: subprocess.Popen[str]) -> str:
    """Give what a program prints until its good end."""
    out, _ = program.communicate(timeout=120)
    assert program.returncode == 0
    return out


def test_from_nothing_to_a_connection(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    recipe = Recipe(text, tmp_path, {})
    packages, device = BLOCK.findall(text)
    assert packages.startswith("apt install python3-pyverbs ")

    def start(command: str) -> subprocess.Popen[str]:
        arguments, settings = recipe.take_command(f"{SETTINGS} {command}")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            arguments,
            cwd=tmp_path,
            # The two ends are one host here, whose memory they could share.
            env={"PATH": path} | settings | {"PYSMC_FABRICS": "verbs"},
            stdout=subprocess.PIPE,
            text=True,
        )

    with no_rdma_device(*DEVICES), contextlib.ExitStack() as undo:
        for name, netdev in zip(("rxe0", "rxe1"), DEVICES, strict=True):
            for line in device.replace("eth0", netdev).splitlines()[:2]:
                run(line.replace("rxe0", name))
            undo.callback(run, f"rdma link del {name}")
        assert run(device.splitlines()[2]).count("state ACTIVE") == 2

        server = undo.enter_context(start("python server.py"))
        undo.callback(server.terminate)
        await_listener(8000)
        seen = rest(start("pysmc doctor --peer 10.0.0.1"))
        print(seen)  # noqa: T201  # for whoever looks at a failure
        assert "fail" not in {line[:4] for line in seen.splitlines()}
        told = rest(start("python client.py 10.0.0.1"))
        assert told == "hello client, over verbs\n"
        assert f"{told}```" in text
    assert recipe.unused() == []
