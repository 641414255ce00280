"""Twin of test_server.BaseStartServer: a server that begins to serve later."""

from __future__ import annotations

import asyncio

import pytest

HELLO = b"1" * 1024 * 5 + b"\n"


def test_start_server_1(lane) -> None:
    async def client(peer) -> None:
        await peer.send(HELLO)
        assert await peer.recv_all(1) == b"1"

    async def scenario() -> None:
        async def serve(reader, writer) -> None:
            await reader.readline()
            main_task.cancel()
            writer.write(b"1")
            writer.close()
            await writer.wait_closed()

        async def main() -> None:
            async with server:
                await server.serve_forever()

        server = await asyncio.start_server(serve, lane.host, 0, start_serving=False)
        assert not server.is_serving()
        main_task = lane.loop.create_task(main())
        address = server.sockets[0].getsockname()
        await lane.until(server.is_serving)
        visit = lane.visit(client, address)
        with pytest.raises(asyncio.CancelledError):
            await main_task
        assert server.sockets == ()
        assert not server.is_serving()
        with pytest.raises(RuntimeError, match="is closed"):
            await server.serve_forever()
        await visit

    lane.run(scenario)
