"""Move real files between two aiohttp processes over SMC-R, and over TCP beside it.

A file server and a client, both unmodified aiohttp, run in two processes under
``pysmc run``; every file's bytes are checked by SHA-256 against the disk. Then the same
two programs do it again on the stock loop. By default the files are Python's own
standard library.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pysmc.config import Config

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

HELP = "move real files between two aiohttp processes, over SMC-R and over TCP"

FILES_MOST = 20_000
"""Most files of a directory that are served."""
HOST = "127.0.0.1"
START_SECONDS = 30
"""How long the server may take to start, and the client to end after its last line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--path",
        type=Path,
        metavar="FILE|DIR",
        help="what to serve (by default Python's standard library)",
    )
    parser.add_argument(
        "--connections",
        type=int,
        default=8,
        metavar="N",
        help="connections of the client, 1-250 (default: 8)",
    )
    parser.add_argument(
        "--fabric",
        choices=("shm", "verbs"),
        help="use only this one (by default what the configuration says)",
    )
    parser.add_argument(
        "--hosts",
        default=HOST,
        metavar="SERVER[,CLIENT]",
        help="addresses of the two processes on this machine (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--require",
        action="store_true",
        help="fail when a connection cannot be SMC-R instead of using TCP",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


def command(options: argparse.Namespace) -> int:
    """Run both passes and print what was seen; 1 when a hash or the mode is wrong."""
    missing = [
        name for name in ("aiohttp", "rich") if importlib.util.find_spec(name) is None
    ]
    if missing:
        print(
            f"pysmc demo: {' and '.join(missing)} is missing; install it with"
            " pip install 'pysmcr[demo]'",
            file=sys.stderr,
        )
        return 2
    if not 1 <= options.connections <= 250:
        print("pysmc demo: --connections wants a number from 1 to 250", file=sys.stderr)
        return 2
    hosts = _addresses(options.hosts)
    if not 1 <= len(hosts) <= 2:
        print("pysmc demo: --hosts wants one or two IP addresses", file=sys.stderr)
        return 2
    try:
        root, files = _find_files(options.path or _standard_library())
        result = _both_passes(root, files, hosts, options)
    except (DemoError, OSError) as error:
        print(f"pysmc demo: {error}", file=sys.stderr)
        return 1
    if options.json:
        result.pop("info")
        print(json.dumps(result))
    else:
        _print_result(result)
    good = result["sha256_equal"] and not (options.require and result["mode"] != "smcr")
    return 0 if good else 1


def _addresses(text: str) -> list[str]:
    try:
        return [str(ip_address(host)) for host in text.split(",")]
    except ValueError:
        return []


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _find_files(path: Path) -> tuple[Path, list[tuple[str, int]]]:
    """List what to serve: (name below the root, size in bytes) of each file."""
    path = path.resolve()
    if path.is_file():
        return path.parent, [(path.name, path.stat().st_size)]
    if not path.is_dir():
        message = f"there is no file or directory {path}"
        raise DemoError(message)
    files: list[tuple[str, int]] = []
    for folder, folders, names in os.walk(path):
        # Installed packages and caches are not the standard library.
        folders[:] = sorted(
            set(folders) - {"site-packages", "dist-packages", "__pycache__"}
        )
        for name in sorted(names):
            file = Path(folder, name)
            # Without links: the server does not follow them either.
            if file.is_file() and not file.is_symlink() and os.access(file, os.R_OK):
                files.append((str(file.relative_to(path)), file.stat().st_size))
        if len(files) > FILES_MOST:
            del files[FILES_MOST:]
            break
    if not files:
        message = f"there is no readable file below {path}"
        raise DemoError(message)
    return path, files


def environment(fabric: str | None, hosts: list[str]) -> dict[str, str]:
    """Make the environment of both processes.

    Over verbs they know of each other by the list of peers, and have one EID; whatever
    the user's environment says of these stays.

    Args:
        fabric: The only one to use; None leaves it to the configuration.
        hosts: The server's address, and the client's if it has one of its own.
    """
    made = dict(os.environ)
    if fabric is not None:
        made["PYSMC_FABRICS"] = fabric
    if fabric == "verbs":
        made.setdefault("PYSMC_DISCOVERY", "static")
        if "static" in made["PYSMC_DISCOVERY"]:
            # In brackets: an address of version 6 has colons, but no port here.
            peers = (f"[{host}]" if ":" in host else host for host in hosts)
            made.setdefault("PYSMC_PEERS", ",".join(peers))
        made.setdefault("PYSMC_UEIDS", "PYSMC.DEMO")
    return made


def _both_passes(
    root: Path,
    files: list[tuple[str, int]],
    hosts: list[str],
    options: argparse.Namespace,
) -> dict[str, Any]:
    total = sum(size for _, size in files)
    made = environment(options.fabric, hosts)
    try:
        Config.from_env(made)
    except ValueError as error:  # else each of the processes would name it
        raise DemoError(error) from error
    with _progress(total, quiet=options.json) as begin:
        run = [sys.executable, "-m", "pysmc", "run"]
        if options.require:
            run.append("--require")
        job = {"files": files, "connections": options.connections}
        job["local"] = hosts[1] if len(hosts) > 1 else None
        both = _Pass(root, hosts[0], job, made)
        smc = both.carry_out([*run, "-m"], begin("SMC-R"))
        tcp = both.carry_out([sys.executable, "-m"], begin("plain TCP"))
    expected = {
        name: hashlib.sha256((root / name).read_bytes()).hexdigest()
        for name, _ in files
    }
    info = smc["infos"][0] if smc["infos"] else None
    modes = smc["modes"]
    return {
        "mode": next(iter(modes)) if len(modes) == 1 else "mixed" if modes else "tcp",
        "fabric": info and info["fabric"],
        "version": info and info["version"],
        "files": len(files),
        "bytes": smc["bytes"],
        "seconds": smc["seconds"],
        "tcp_seconds": tcp["seconds"],
        "sha256_equal": smc["digests"] == expected == tcp["digests"],
        "connections": smc["connections"],
        "reasons": smc["reasons"],
        "info": info,
    }


class _Pass(NamedTuple):
    """What both passes have in common."""

    root: Path
    host: str
    job: dict[str, Any]
    environment: dict[str, str]

    def carry_out(
        self, command: list[str], advance: Callable[[int], None]
    ) -> dict[str, Any]:
        """Start the server, let the client download everything, give its report."""
        with contextlib.ExitStack() as stack:
            server = self._start(
                stack, [*command, "pysmc.cli.demo_server", str(self.root), self.host]
            )
            # Leaving ends the server's standard input, and with that the server.
            stack.callback(server.terminate)
            # It waits for its job, and its start may take as long as the server's.
            client = self._start(stack, [*command, "pysmc.cli.demo_client"])
            stack.callback(client.kill)
            assert server.stdout is not None
            port = server.stdout.readline().strip()
            if not port:
                message = f"the server did not start, exit code {server.wait()}"
                raise DemoError(message)
            host = f"[{self.host}]" if ":" in self.host else self.host
            return _follow(
                client, self.job | {"base": f"http://{host}:{port}/"}, advance
            )

    def _start(
        self, stack: contextlib.ExitStack, command: list[str]
    ) -> subprocess.Popen[str]:
        return stack.enter_context(
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self.environment,
            )
        )


def _follow(
    client: subprocess.Popen[str], job: dict[str, Any], advance: Callable[[int], None]
) -> dict[str, Any]:
    assert client.stdin is not None
    assert client.stdout is not None
    json.dump(job, client.stdin)
    client.stdin.close()
    line: dict[str, Any] = {}
    for text in client.stdout:
        line = json.loads(text)
        if "received" in line:
            advance(line["received"])
    if "failed" in line:
        raise DemoError(line["failed"])
    code = client.wait(START_SECONDS)
    if code != 0 or "digests" not in line:
        message = f"the client failed, exit code {code}"
        raise DemoError(message)
    return line


@contextlib.contextmanager
def _progress(
    total: int, *, quiet: bool
) -> Iterator[Callable[[str], Callable[[int], None]]]:
    """Show a bar for each pass; gives a function that begins one."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:

        def begin(name: str) -> Callable[[int], None]:
            task = progress.add_task(name, total=total)
            return lambda done: progress.update(task, completed=done)

        yield begin


def _print_result(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    info = result["info"] or {}
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    how = result["mode"]
    if info.get("mode") == "smcr":
        how = f"SMC-R version {info['version']} over {info['fabric']}"
    table.add_row("connections", f"{result['connections']}, {how}")
    if info.get("link_group") is not None:
        links = ", ".join(str(link) for link in info["links"])
        table.add_row("link group", f"{info['link_group']} (link {links})")
        table.add_row("EID", info["eid"])
        table.add_row("buffers", f"{info['rmbe_bytes']} bytes a connection and side")
    for name, count in result["reasons"].items():
        reason = info.get("reason") or {}
        text = reason.get("text", "") if reason.get("name") == name else ""
        table.add_row("plain TCP", f"{count} connections: {name}. {text}")
    table.add_row("files", f"{result['files']}, {result['bytes'] / 1e6:.1f} MB")
    table.add_row("SHA-256", "all equal" if result["sha256_equal"] else "DIFFERENT")
    for title, seconds in (
        ("SMC-R rate" if result["mode"] == "smcr" else "pysmc rate", result["seconds"]),
        ("TCP rate", result["tcp_seconds"]),
    ):
        rate = result["bytes"] / 1e6 / seconds if seconds else 0.0
        table.add_row(title, f"{rate:,.1f} MB/s ({seconds:.2f} s)")
    Console().print(table)
