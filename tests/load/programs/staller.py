"""Clients that stall in the middle of the handshake, each with a peer ID of its own.

How far each goes:

* ``found``: it is found at its rendezvous, and does not answer.
* ``half``: it agrees on SMC-R and sends half a Proposal.
* ``proposal``: it sends a Proposal and looks at nothing that comes.
* ``accept``: it takes the Accept, and sends no Confirm.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from orders import obey  # type: ignore[import-not-found]

from pysmc.config import Config
from pysmc.discovery import Discovery, Mark
from pysmc.discovery.address import connection_id
from pysmc.discovery.rendezvous import rendezvous_name
from pysmc.fabric.shm import host_eid
from smcproto import clc, clc_v2
from smcproto.constants import PathType

HOST = "127.0.0.1"
GID = bytes(10) + b"\xff\xff\x7f\x00\x00\x01"


def proposal() -> bytes:
    """Build what a loop of this host would send, under a name that nobody has."""
    return clc.Proposal(
        version=2,
        peer_id=os.urandom(8),
        gid=bytes(16),
        mac=os.urandom(6),
        typev1=PathType.NONE,
        typev2=PathType.SMCR,
        ip_area=None,
        v2=clc_v2.ProposalExtension(
            eids=(host_eid(),),
            release=1,
            gid=GID,
            max_connections=255,
            max_links=1,
        ),
    ).build()


class Stallers:
    """The clients of one process."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.discovery = Discovery(self.loop, Config(discovery_wait=30))
        self.open: list[socket.socket] = []

    async def stall(self, port: int, counts: dict[str, int]) -> dict[str, int]:
        """Bring so many clients to where they stall; gives how many got there."""
        number = max(counts.values())
        ways = [way for k in range(number) for way in counts if k < counts[way]]
        arrived = 0
        for first in range(0, len(ways), 16):
            some = [self._stall(port, way) for way in ways[first : first + 16]]
            arrived += sum(await asyncio.gather(*some))
        return {"stalled": arrived}

    async def _stall(self, port: int, way: str) -> bool:
        sock = socket.socket()
        self.open.append(sock)
        mark = self.discovery.prepare(sock, (HOST, port))
        assert isinstance(mark, Mark), mark
        sock.connect((HOST, port))
        sock.setblocking(False)
        if way == "found":
            return await self._be_found(sock)
        self.discovery.connected(mark)
        if not (await self.discovery.wait_confirmed(mark)).smc:
            return False
        message = proposal()
        if way == "half":
            message = message[: len(message) // 2]
        await self.loop.sock_sendall(sock, message)
        if way == "accept":
            # Behind other first contacts of this process it does not come in time.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    return len(await self.loop.sock_recv(sock, 2048)) > 0
        return True

    async def _be_found(self, sock: socket.socket) -> bool:
        listener = socket.socket(socket.AF_UNIX)
        self.open.append(listener)
        listener.bind(rendezvous_name(connection_id(sock, client=True)))
        listener.listen()
        listener.setblocking(False)
        conn, _ = await self.loop.sock_accept(listener)
        self.open.append(conn)
        return True

    def leave(self) -> dict[str, int]:
        """Close everything."""
        for sock in self.open:
            sock.close()
        count = len(self.open)
        self.open.clear()
        return {"closed": count}


async def main() -> None:
    """Take orders."""
    stallers = Stallers()
    await obey({"stall": stallers.stall, "leave": stallers.leave})
    stallers.leave()
    stallers.discovery.close()


if __name__ == "__main__":
    asyncio.run(main())
