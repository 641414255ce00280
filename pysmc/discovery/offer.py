"""The server's end of the rendezvous: one accepted connection that was marked.

Decides when a server looks for the name that its client opened, how long, and what it
makes of what is found there. What the two say to each other, and why they never
disagree, is told in `local`.

Source: unix(7); kernel counterpart: af_unix.c (unix_stream_sendmsg and unix_shutdown
exclude each other by the receiver's lock).
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from pysmc.discovery.address import connection_id, endpoint, is_local
from pysmc.discovery.rendezvous import (
    NO,
    OFFER,
    REFUSE,
    VERSION,
    Refusal,
    Users,
    Verdict,
    answer_of,
    failed,
    foreign,
    process_of,
    receive,
    rendezvous_name,
    send,
    stream_socket,
    tcp,
)

if TYPE_CHECKING:
    import asyncio

    from pysmc.reasons import Reason

__all__ = ["OFFERED_SHARE", "SERVER_SHARE", "Offer"]

SPIN = 0.0003
"""Seconds in which a server looks for the client's name at each turn of the loop."""
RETRY_FIRST = 0.0005
"""Seconds until the next look after that; each further one takes twice as long."""
RETRY_MOST = 0.032
"""Longest time in seconds between two looks."""
SERVER_SHARE = 0.5
"""Part of ``Config.discovery_wait`` after which a server gives up the search."""
OFFERED_SHARE = 4.0
"""The same once it has offered. A client that has gone, or has decided without us, ends
the rendezvous at once; one that is silent but there is busy, with a thousand other
connections for example."""

NOT_LISTENING = frozenset({errno.ECONNREFUSED, errno.EAGAIN})


class Offer:
    """The server's end: one accepted connection that was marked."""

    # Whoever is found and does not answer costs as little as can be.
    __slots__ = (
        "_abandoned",
        "_begin",
        "_conn",
        "_deadline",
        "_delay",
        "_done",
        "_id",
        "_instead",
        "_loop",
        "_offered",
        "_process",
        "_retry",
        "_unix",
        "_users",
        "_verdict",
        "_wait_seconds",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        conn: socket.socket,
        users: Users,
        *,
        wait: float,
        instead: Reason | None = None,
    ) -> None:
        """Prepare to look for the client of a connection.

        Args:
            loop: The running loop.
            conn: The accepted TCP socket; it stays the caller's.
            users: Who may be the client.
            wait: The client's ``discovery_wait``, as far as we know it, in seconds.
            instead: The limit because of which the client gets a refusal, no offer.
        """
        self._loop = loop
        self._conn = conn
        self._users = users
        self._wait_seconds = wait
        self._instead = instead
        self._process: int | None = None
        self._id = b""
        self._unix: socket.socket | None = None
        self._offered = False
        self._abandoned = False
        self._delay = RETRY_FIRST
        self._begin = 0.0
        self._retry: asyncio.Handle | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._verdict: Verdict | None = None
        self._done: asyncio.Future[None] = loop.create_future()

    async def verdict(self) -> Verdict:
        """Find the client, offer, and wait for its answer.

        After a cancellation the verdict is unknown: the TCP connection must be closed.
        """
        fileno = self._conn.fileno()
        try:
            self._id = connection_id(self._conn, client=False)
            self._unix = stream_socket()
        except OSError as error:
            return failed("The client cannot be looked for", error)
        self._set_deadline(SERVER_SHARE)
        # The client sends nothing before its verdict; if something can be read, or the
        # connection has ended, that verdict has been reached.
        self._loop.add_reader(fileno, self._give_up)
        try:
            self._look()
            await self._done
        finally:
            if not self._abandoned:
                self._loop.remove_reader(fileno)
            self._release()
        assert self._verdict is not None
        return replace(self._verdict, process=self._process)

    def close(self) -> None:
        """Give up now; the verdict is still the client's if it has answered."""
        self._give_up()

    def abandon(self) -> None:
        """In a forked child: close the copy, and leave the parent's loop alone."""
        # The coroutine may be collected here; it must not reach the shared epoll.
        self._abandoned = True
        if self._unix is not None:
            self._unix.close()
            self._unix = None

    def _look(self) -> None:
        """Connect to the client's name, now or a little later."""
        assert self._unix is not None
        self._retry = None
        code = self._unix.connect_ex(rendezvous_name(self._id))
        if code == 0:
            self._offer(self._unix)
            return
        if code not in NOT_LISTENING:
            detail = f"The client's name cannot be reached: {os.strerror(code)}."
            self._settle(tcp("MARK_LOST", "local", detail))
            return
        now = self._loop.time()
        if self._begin == 0.0:
            self._begin = now
            if not self._peer_is_local():
                # Somebody else's use of a DSCP that is meant for experiments.
                detail = "Its address is not of this host."
                self._settle(tcp("PEER_NO_SMC", "peer", detail))
                return
        # We mostly see the connection a moment before the client's loop does, and a
        # timer of a loop cannot be shorter than a millisecond.
        if now - self._begin < SPIN:
            self._retry = self._loop.call_soon(self._look)
            return
        self._retry = self._loop.call_later(self._delay, self._look)
        self._delay = min(self._delay * 2, RETRY_MOST)

    def _peer_is_local(self) -> bool:
        try:
            peer = endpoint(self._conn.getpeername())
        except OSError:
            return False
        return peer is not None and is_local(peer)

    def _offer(self, unix: socket.socket) -> None:
        uid = self._users.foreign(unix)
        if uid is not None:
            send(unix, REFUSE + bytes([Refusal.FOREIGN]))
            self._settle(foreign(uid))
            return
        if self._instead is not None:
            send(unix, REFUSE + bytes([Refusal.LIMIT]))
            self._settle(Verdict(smc=False, reason=self._instead))
            return
        self._process = process_of(unix)
        try:
            # The name is bound only while its owner is connected. If our connection
            # is alive now, it is the owner's: no two have the same identity.
            self._conn.getpeername()
        except OSError as error:
            send(unix, REFUSE + bytes([Refusal.UNFIT]))
            detail = f"The connection has gone: {error}."
            self._settle(tcp("MARK_LOST", "local", detail))
            return
        if not send(unix, OFFER + bytes([VERSION]) + self._id):
            # A client that refuses our user says so as soon as we connect, and leaves.
            said = receive(unix) or b""
            gone = tcp("MARK_LOST", "peer", "It closed its rendezvous.")
            self._settle(answer_of(said) if said[:1] == NO else gone)
            return
        self._offered = True
        self._set_deadline(OFFERED_SHARE)
        self._loop.add_reader(unix.fileno(), self._on_answer)

    def _on_answer(self) -> None:
        assert self._unix is not None
        message = receive(self._unix)
        if message is not None:
            self._settle(answer_of(message))

    def _set_deadline(self, share: float) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        wait = self._wait_seconds * share
        self._deadline = self._loop.call_later(wait, self._give_up)

    def _give_up(self) -> None:
        """Make a later answer impossible, then go by the one that has come, if any."""
        if self._done.done():
            return
        if self._unix is None or not self._offered:
            detail = "Its rendezvous was not found."
            self._settle(tcp("MARK_LOST", "peer", detail))
            return
        self._unix.shutdown(socket.SHUT_RD)
        self._settle(answer_of(receive(self._unix) or b""))

    def _settle(self, verdict: Verdict) -> None:
        if not self._done.done():
            self._verdict = verdict
            self._done.set_result(None)
        self._release()

    def _release(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._unix is not None:
            self._loop.remove_reader(self._unix.fileno())
            self._unix.close()
            self._unix = None
