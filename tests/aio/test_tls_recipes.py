"""The examples of the page on TLS, carried out as they stand there."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.free_ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "howto" / "tls.md").read_text(encoding="utf-8")
FILES = dict(
    re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
)
CONSOLES = re.findall(r"^```console\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
LAST_LINES = {
    "pysmc": "pysmc.run(main())\n",
    "asyncio": "import asyncio\nasyncio.run(main())\n",
    "uvloop": "import uvloop\nuvloop.run(main())\n",
}
DEADLINE = 30.0


class Folder:
    """Where the files of the page are, with ports of their own."""

    def __init__(self, path: Path, loop: str) -> None:
        self._path = path
        self._servers: list[subprocess.Popen[str]] = []
        ports: dict[str, str] = {}
        for port in set(re.findall(r"\b84\d\d\b", "".join(FILES.values()))):
            ports[port] = str(free_port())
        for name, body in FILES.items():
            text = re.sub(r"\b84\d\d\b", lambda found: ports[found[0]], body)
            text = text.replace(LAST_LINES["pysmc"], LAST_LINES[loop])
            (path / name).write_text(text)

    def _start(self, name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-W", "error", name],
            cwd=self._path,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, name: str) -> tuple[str, str]:
        """Carry a file out; gives what it says, and what it complains of."""
        return self._start(name).communicate(timeout=DEADLINE)

    def serve(self, name: str) -> None:
        process = self._start(name)
        self._servers.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

    def end(self) -> None:
        for process in self._servers:
            process.kill()
            process.communicate(timeout=DEADLINE)


@contextlib.contextmanager
def folder(path: Path, loop: str) -> Iterator[Folder]:
    made = Folder(path, loop)
    try:
        yield made
    finally:
        made.end()


def shown(command: str) -> str:
    """Give what the page says that a command prints."""
    for console in CONSOLES:
        if f"$ {command}\n" in console:
            lines = console.partition(f"$ {command}\n")[2].splitlines(keepends=True)
            return "".join(line for line in lines if not line.startswith("$ "))
    raise AssertionError(command)


SERVED = {
    "server.py": ("client.py", "pinned_client.py"),
    "mutual_server.py": ("mutual_client.py",),
    "upgrade_server.py": ("upgrade_client.py",),
}
MADE = {"root.pem", "server.pem", "client.pem"}


def test_nothing_on_the_page_is_left_out() -> None:
    clients = {client for clients in SERVED.values() for client in clients}
    assert {"make_certificates.py", *SERVED, *clients} == FILES.keys()
    for name in FILES:
        assert any(f"$ python {name}\n" in console for console in CONSOLES)


@pytest.mark.slow
@pytest.mark.load  # every printed word counts
@pytest.mark.parametrize("loop", LAST_LINES)
@pytest.mark.parametrize("server", SERVED)
def test_the_page(tmp_path, loop, server) -> None:
    with folder(tmp_path, loop) as files:
        assert files.run("make_certificates.py") == ("", "")
        assert {path.name for path in tmp_path.glob("*.pem")} == MADE
        files.serve(server)
        for client in SERVED[server]:
            assert files.run(client) == (shown(f"python {client}"), "")


@pytest.mark.slow
def test_another_certificate_than_the_pinned_one(tmp_path) -> None:
    with folder(tmp_path, "pysmc") as files:
        files.run("make_certificates.py")
        files.serve("server.py")
        (tmp_path / "server.pem").unlink()
        (tmp_path / "client.pem").rename(tmp_path / "server.pem")
        said, complaint = files.run("pinned_client.py")
        assert said == ""
        assert complaint == "another certificate than the pinned one\n"
