"""An httpx client on pysmc's loop; prints what it saw of a service as JSON.

Arguments: the port, and the number of connections to open one after another.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from typing import Any

import httpx

import pysmc


async def main() -> dict[str, Any]:
    """Open connections, and send two requests over each."""
    seen: dict[str, Any] = {
        "modes": Counter(), "workers": Counter(), "loops": Counter(), "equal": 0,
    }  # fmt: skip
    for number in range(int(sys.argv[2])):
        body = random.Random(number).randbytes(300_000)
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{sys.argv[1]}", trust_env=False
        ) as client:
            echo = await client.post("/echo", content=body)
            seen["equal"] += echo.content == body
            answer = await client.get("/worker")
            seen["workers"][answer.json()["pid"]] += 1
            seen["loops"][answer.json()["loop"]] += 1
            stream = answer.extensions["network_stream"]
            # httpcore gives out sockets only; the transport is two wrappers below.
            info = stream._stream._transport.get_extra_info("smc")
            seen["modes"][info.mode] += 1
    return seen


if __name__ == "__main__":
    print(json.dumps(pysmc.run(main())), flush=True)
