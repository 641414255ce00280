"""How a program of these tests takes orders: JSON, one a line, answered in kind."""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["obey"]


async def obey(orders: dict[str, Callable[..., Any]]) -> None:
    """Take orders until standard input ends."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    pipe, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    print(json.dumps({"ready": True}), flush=True)
    while line := await lines.readline():
        order = json.loads(line)
        answer = orders[order.pop("do")](**order)
        if asyncio.iscoroutine(answer):
            answer = await answer
        print(json.dumps(answer), flush=True)
    pipe.close()
