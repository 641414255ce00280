"""asyncpg, with all that it does over a connection; prints what it saw as JSON.

Arguments: the port, and the file with the authority that signed the server's
certificate.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import ssl
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import asyncpg  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROWS = 4000
NUMBERS = f"SELECT n, md5(n::text) FROM generate_series(1, {ROWS}) AS n"


def connect(**options: Any) -> Any:
    """Open a connection."""
    return asyncpg.connect(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        user="tester",
        database="postgres",
        timeout=20,
        **options,
    )


def md5(number: int) -> str:
    """Hash a number as the server does."""
    return hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()


async def query(one: Any) -> list[bool]:
    """Many rows, a big value both ways, and an error that ends a transaction."""
    rows = await one.fetch(NUMBERS)
    value = random.Random(0).randbytes(1_000_000)
    same = await one.fetchval("SELECT $1::bytea", value)
    try:
        async with one.transaction():
            await one.execute("CREATE TABLE never (n int)")
            await one.execute("SELECT 1 / 0")
    except asyncpg.DivisionByZeroError:
        table = await one.fetchval("SELECT to_regclass('never')")
    return [
        [tuple(row) for row in rows] == [(n, md5(n)) for n in range(1, ROWS + 1)],
        same == value,
        table is None,
    ]


async def copy(one: Any) -> dict[str, bool]:
    """Copy rows in and out; the hashes are made at both ends."""
    await one.execute("CREATE TEMPORARY TABLE lines (n int, body text)")
    sent, got = hashlib.sha256(), hashlib.sha256()
    noise = random.Random(2)

    async def lines() -> AsyncIterator[bytes]:
        for n in range(ROWS):
            line = f"{n}\t{noise.randbytes(n % 1000).hex()}\n".encode()
            sent.update(line)
            yield line

    async def take(data: bytes) -> None:
        got.update(data)

    await one.copy_to_table("lines", source=lines())
    stored = await one.fetchval(
        "SELECT encode(sha256(string_agg(n || E'\\t' || body || E'\\n', '' ORDER BY n)"
        "::bytea), 'hex') FROM lines"
    )
    await one.copy_from_query("SELECT * FROM lines ORDER BY n", output=take)
    return {
        "in": stored == sent.hexdigest(), "out": got.hexdigest() == sent.hexdigest()
    }  # fmt: skip


async def notify(one: Any, other: Any) -> bool:
    """Tell the one connection what was said on the other."""
    heard: asyncio.Queue[str] = asyncio.Queue()

    def on_news(_connection: Any, _pid: int, _channel: str, payload: str) -> None:
        heard.put_nowait(payload)

    await one.add_listener("news", on_news)
    news = ["x" * size for size in (0, 1, 7000)]
    for payload in news:
        await other.execute("SELECT pg_notify('news', $1)", payload)
    async with asyncio.timeout(10):
        told = [await heard.get() for _ in news]
    await one.remove_listener("news", on_news)
    return told == news


async def cancel(one: Any, other: Any) -> list[int]:
    """Cancel a query that would take long, and use the connection again."""
    running = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE state = 'active' AND query = 'SELECT pg_sleep(500)'"
    )
    task = asyncio.create_task(one.execute("SELECT pg_sleep(500)"))
    async with asyncio.timeout(10):
        while not await other.fetchval(running):
            pass
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return [await one.fetchval("SELECT 42"), await other.fetchval(running)]


async def main() -> dict[str, Any]:
    """Do all of it on a plain connection, and what carries bytes with TLS again."""
    seen: dict[str, Any] = {}
    one, other = await connect(ssl=False), await connect(ssl=False)
    # asyncpg keeps its transport to itself.
    seen["info"] = asdict(one._transport.get_extra_info("smc"))
    seen["queries"] = await query(one)
    seen["copy"] = await copy(one)
    seen["notify"] = await notify(one, other)
    seen["cancel"] = await cancel(one, other)
    context = ssl.create_default_context(cafile=sys.argv[2])
    tls = await connect(ssl=context)
    uses_tls = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    seen["tls"] = {
        "mode": tls._transport.get_extra_info("smc").mode,
        "is_used": [await each.fetchval(uses_tls) for each in (one, tls)],
        "queries": await query(tls),
        "copy": await copy(tls),
        "cancel": await cancel(tls, other),
    }
    for each in (one, other, tls):
        await each.close()
    return seen


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())), flush=True)
