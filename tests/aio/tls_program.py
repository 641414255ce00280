"""TLS over SMC-R with nothing but pysmc: for any Python, run by a test.

Usage: tls_program.py ROOT SERVER, the authority's certificate and the server's with its
key. Says what it tried, as a JSON list; each connection must be on SMC-R.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
import sys
from typing import TYPE_CHECKING, Any

import pysmc

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

HOST, NAME = "127.0.0.1", "localhost"
PATIENCE = 20.0
DATA = random.Random(1).randbytes(1_000_000)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(sys.argv[2])
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(sys.argv[1])
    return server, client


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert writer.get_extra_info("smc").mode == "smcr"
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        while data := await reader.read(65536):
            if data == b"STARTTLS\n":
                writer.write(b"go\n")
                await writer.start_tls(contexts()[0])
                continue
            writer.write(data)
            await writer.drain()
    writer.close()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        await writer.wait_closed()


async def leave(writer: asyncio.StreamWriter) -> None:
    writer.close()
    await writer.wait_closed()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert writer.get_extra_info("smc").mode == "smcr"
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    writer.write(DATA)
    received, _ = await asyncio.gather(reader.readexactly(len(DATA)), writer.drain())
    assert received == DATA


async def open_tls(port: int) -> str:
    reader, writer = await pysmc.open_connection(
        HOST, port, ssl=contexts()[1], server_hostname=NAME
    )
    await exchange(reader, writer)
    await leave(writer)
    return "a MB there and back"


async def upgrade(port: int) -> str:
    reader, writer = await pysmc.open_connection(HOST, port)
    writer.write(b"STARTTLS\n")
    assert await reader.readline() == b"go\n"
    await writer.start_tls(contexts()[1], server_hostname=NAME)
    await exchange(reader, writer)
    await leave(writer)
    return "start_tls"


async def wrong_name(port: int) -> str:
    try:
        await pysmc.open_connection(
            HOST, port, ssl=contexts()[1], server_hostname="no.invalid"
        )
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    return "was not refused"


async def corrupt(port: int) -> str:
    reader, writer = await pysmc.open_connection(
        HOST, port, ssl=contexts()[1], server_hostname=NAME
    )
    writer.write(b"good")
    assert await reader.readexactly(4) == b"good"
    beneath: Any = writer.transport._ssl_protocol._transport
    beneath.write(b"\x17\x03\x03\x00\x20" + bytes(32))
    try:
        return repr(await reader.read())
    except ConnectionResetError:
        return "reset"
    finally:
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            await leave(writer)


async def abort(port: int) -> str:
    reader, writer = await pysmc.open_connection(
        HOST, port, ssl=contexts()[1], server_hostname=NAME
    )
    writer.transport.abort()
    return repr(await reader.read())


def on_problem(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """In debug mode a server tells of clients that fail at TLS; anything else ends."""
    if not isinstance(context.get("exception"), ssl.SSLError | ConnectionError):
        sys.exit(f"unexpected: {context}")


async def tour() -> list[str]:
    said = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(on_problem)
    loop.slow_callback_duration = PATIENCE  # a busy machine is no fault
    steps: list[tuple[bool, Callable[[int], Coroutine[Any, Any, str]]]] = [
        (True, open_tls),
        (True, wrong_name),
        (True, corrupt),
        (True, abort),
        (False, upgrade),
    ]
    for is_tls, step in steps:
        options = {"ssl": contexts()[0]} if is_tls else {}
        server = await pysmc.start_server(echo, HOST, 0, **options)
        async with asyncio.timeout(PATIENCE):
            said.append(await step(server.sockets[0].getsockname()[1]))
            server.close()
            await server.wait_closed()
            while len(asyncio.all_tasks()) > 1:
                await asyncio.sleep(0)
    return said


def main() -> None:
    said = ["Python " + ".".join(map(str, sys.version_info[:2]))]
    said += pysmc.run(tour())
    said += asyncio.run(tour())
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
