"""The demo's client: an ordinary aiohttp client that downloads a list of files.

It reads one JSON job from standard input and prints one JSON object a line: progress
while it runs, and at the end how each connection was made. Transfers are timed without
the hashing: bodies are kept for a batch, the clock stops, then they are hashed.

That a connection can say what carries it is all that is pysmc's own here, and on the
stock loop the answer is simply missing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from typing import Any, TypedDict
from urllib.parse import quote

import aiohttp

BATCH_BYTES = 64 << 20
"""Bodies that are kept before the clock stops for hashing."""
STEP_BYTES = 4 << 20
"""Progress is told so often that a bar moves, and so seldom that it costs nothing."""
TIMEOUT_SECONDS = 120


class Job(TypedDict):
    """What the demo asks for."""

    base: str
    """URL before the files' names."""
    files: list[list[Any]]
    """[name below the root, size in bytes] of each file."""
    connections: int
    """How many connections to use."""
    local: str | None
    """The address to connect from; None leaves it to the kernel."""


def batches(files: list[list[Any]]) -> list[list[str]]:
    """Cut the list so that each piece fits into memory."""
    pieces: list[list[str]] = [[]]
    held = 0
    for name, size in files:
        if held + size > BATCH_BYTES and pieces[-1]:
            pieces.append([])
            held = 0
        pieces[-1].append(name)
        held += size
    return pieces


class Connections:
    """What was seen of the connections, one entry for each."""

    def __init__(self) -> None:
        self._seen: dict[Any, dict[str, Any] | None] = {}

    def note(self, transport: asyncio.BaseTransport | None) -> None:
        """Look at the connection that a request has just gone over."""
        if transport is not None and transport not in self._seen:
            info = transport.get_extra_info("smc")
            self._seen[transport] = None if info is None else asdict(info)

    def response_class(self) -> type[aiohttp.ClientResponse]:
        """Make responses that let us look: a finished one knows no connection."""
        note = self.note

        class Response(aiohttp.ClientResponse):
            async def start(self, connection: Any) -> aiohttp.ClientResponse:
                note(connection.transport)
                return await super().start(connection)

        return Response

    def report(self) -> dict[str, Any]:
        """Summarise modes, reasons and the first connection's details."""
        infos = [info for info in self._seen.values() if info is not None]
        reasons = Counter(i["reason"]["name"] for i in infos if i["reason"])
        return {
            "connections": len(self._seen),
            "modes": Counter(info["mode"] for info in infos),
            "reasons": reasons,
            "infos": infos[:1],
        }


def tell(received: int) -> int:
    """Print how many bytes there are by now, and give that number."""
    print(json.dumps({"received": received}), flush=True)
    return received


async def download(job: Job) -> dict[str, Any]:
    """Download every file; give the times, the hashes and the connections."""
    seen = Connections()
    digests: dict[str, str] = {}
    seconds = 0.0
    received = told = 0
    local = (job["local"], 0) if job["local"] else None
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=job["connections"], local_addr=local),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=TIMEOUT_SECONDS),
        response_class=seen.response_class(),
        auto_decompress=False,
    ) as session:

        async def worker(todo: list[str], bodies: dict[str, bytes]) -> None:
            nonlocal received, told
            while todo:
                name = todo.pop()
                async with session.get(job["base"] + quote(name)) as response:
                    response.raise_for_status()
                    bodies[name] = body = await response.read()
                received += len(body)
                if received >= told + STEP_BYTES:
                    told = tell(received)

        for batch in batches(job["files"]):
            bodies: dict[str, bytes] = {}
            todo = batch[::-1]
            start = time.perf_counter()
            await asyncio.gather(
                *(worker(todo, bodies) for _ in range(job["connections"]))
            )
            seconds += time.perf_counter() - start
            for name, body in bodies.items():
                digests[name] = hashlib.sha256(body).hexdigest()
            tell(received)
    return {
        "seconds": seconds,
        "bytes": received,
        "digests": digests,
        **seen.report(),
    }


def main() -> int:
    """Do the job; say in one line what kept a connection from being made."""
    job = json.load(sys.stdin)
    try:
        report = asyncio.run(download(job))
    except aiohttp.ClientConnectorError as error:
        report = {"failed": f"no connection to the server: {error.os_error}"}
    print(json.dumps(report), flush=True)
    return int("failed" in report)


if __name__ == "__main__":
    sys.exit(main())
