"""A notebook without a browser: cells come as JSON, what they print goes out as JSON.

The kernel is a real one, whose loop runs before any cell does. Ends when its standard
input does.
"""

# ruff: noqa: T201  # a program answers on standard output

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from jupyter_client.manager import start_new_kernel

if TYPE_CHECKING:
    from jupyter_client.blocking.client import BlockingKernelClient

CELL_WAIT = 25.0
"""Seconds that one cell may take."""


def execute(client: BlockingKernelClient, code: str) -> dict[str, Any]:
    """Execute a cell to its end."""
    printed: list[str] = []
    errors: list[str] = []

    def take(message: dict[str, Any]) -> None:
        content = message["content"]
        if message["msg_type"] == "stream":
            printed.append(content["text"])
        elif message["msg_type"] == "execute_result":
            printed.append(content["data"]["text/plain"])
        elif message["msg_type"] == "error":
            errors.extend(content["traceback"])

    client.execute_interactive(
        code, output_hook=take, allow_stdin=False, timeout=CELL_WAIT
    )
    found = {"printed": "".join(printed)}
    return found | ({"error": "\n".join(errors)} if errors else {})


def main() -> None:
    """Execute cells until standard input ends."""
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            answer = execute(client, json.loads(line)["code"])
            print(json.dumps(answer), flush=True)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=False)


if __name__ == "__main__":
    main()
