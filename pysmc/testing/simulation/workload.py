"""What the programs of a swarm do: whom they call, what they write, how they end.

A `Script` is the program of one end, a `Conversation` two of them and who calls whom.
`Town` makes them talk in a world: servers that give every caller its script, clients
that dial. It decides nothing about faults, and nothing about what is a violation.

Source: RFC 7609 section 4.8 and the asyncio documentation for the ways to end.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pysmc.testing.simulation.stream import Flows
from pysmc.testing.simulation.talk import (
    APIS,
    BACKLOG_BYTES,
    End,
    StreamTalk,
    Talk,
    pause,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from pysmc.testing.simulation.process import Process
    from pysmc.testing.simulation.world import World

__all__ = ["Conversation", "Script", "Town", "draw_conversation"]

SIZES = (0, 1, 2, 3, 15, 16, 17, 64, 100, 1000, 1460, 5000, 16383, 16384, 16385, 20000)
LARGE_SIZES = (65535, 65536, 65537, 200_000, 300_000)
POLITE_ENDS = ("finish", "finish", "finish", "follow")
RUDE_ENDS = ("close", "abort", "stop")


@dataclass(frozen=True, slots=True)
class Script:
    """What one end does."""

    api: str = "stream"
    """A key of `APIS`."""
    style: str = "duplex"
    """"duplex" writes and reads at once; "ask" writes and then reads as much, piece by
    piece; "answer" writes as much as it has read."""
    writes: tuple[int, ...] = ()
    """Sizes in bytes."""
    pauses: tuple[float, ...] = ()
    """Seconds before each write; where there are fewer, no pause."""
    read_bytes: int = 65536
    """Most bytes of one read."""
    read_pause: float = 0.0
    """Seconds after each read."""
    end: str = "finish"
    """"finish" says that it has written all, reads to the end and closes; "follow"
    reads to the end first; "close" closes when all is written; "abort" aborts then;
    "stop" closes after the first read, whatever comes."""
    cancel_step: int = 0
    """The step of its task at which that is cancelled; 0 for never."""
    linger: float = 0.0
    """Seconds before it closes."""
    patience: float = 400.0
    """Seconds that it waits for others, beyond what both programs pause themselves:
    longer than every wait of ours that a fault can cause."""

    @property
    def is_rude(self) -> bool:
        """Whether it may end before everything was said."""
        return self.end in RUDE_ENDS or self.cancel_step > 0

    def pauses_over(self, peer_writes: tuple[int, ...]) -> float:
        """Tell how many seconds it pauses, at most.

        Args:
            peer_writes: Sizes of what it has to read.
        """
        # While it pauses, all comes that there is room for. So a read is a short one
        # only at the first piece of a write, at its last, and behind a full backlog.
        total = sum(peer_writes)
        short = 2 * len(peer_writes) + total // BACKLOG_BYTES
        reads = total // self.read_bytes + short
        return sum(self.pauses) + reads * self.read_pause + self.linger


@dataclass(frozen=True, slots=True)
class Conversation:
    """Who talks to whom."""

    caller: int
    """Number of the process that connects."""
    listener: int
    """Number of the process that is called; may be the same."""
    client: Script
    server: Script
    begin: float = 0.0
    """Seconds until the call."""

    @property
    def is_rude(self) -> bool:
        """Whether one end may end before everything was said."""
        return self.client.is_rude or self.server.is_rude

    @property
    def pauses_seconds(self) -> float:
        """How long both programs pause, at most; no wait of ours is in it."""
        client, server = self.client, self.server
        # Who asks reads without a pause, so an answer's size need not be known.
        return client.pauses_over(server.writes) + server.pauses_over(client.writes)


def draw_script(rng: random.Random, *, most_bytes: int, pace: float) -> Script:
    """Draw the program of one end.

    Args:
        rng: Decides.
        most_bytes: How much it may write in all.
        pace: Longest pause in seconds.
    """
    writes: list[int] = []
    left = rng.choice((0, 1, 100, 5000, most_bytes, most_bytes))
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5, 8))):
        sizes = LARGE_SIZES if rng.random() < 0.06 else SIZES
        size = min(left, rng.choice(sizes))
        writes.append(size)
        left -= size
    pauses = tuple(
        rng.random() * pace if rng.random() < 0.2 else 0.0 for _ in range(len(writes))
    )
    return Script(
        api=rng.choice(("stream", "protocol", "protocol", "buffer")),
        writes=tuple(writes),
        pauses=pauses,
        read_bytes=rng.choice((1 << 16, 1 << 16, 4096, 700)),
        read_pause=rng.random() * pace / 10 if rng.random() < 0.15 else 0.0,
        linger=rng.random() * pace if rng.random() < 0.1 else 0.0,
    )


def draw_conversation(
    rng: random.Random, processes: int, *, most_bytes: int, pace: float
) -> Conversation:
    """Draw a conversation.

    Args:
        rng: Decides.
        processes: How many there are; the first one usually listens.
        most_bytes: How much each end may write in all.
        pace: Longest pause in seconds.
    """
    client = draw_script(rng, most_bytes=most_bytes, pace=pace)
    server = draw_script(rng, most_bytes=most_bytes, pace=pace)
    kind = rng.random()
    changes: dict[str, Any] = {}
    if kind < 0.3:
        client = _replace(client, style="ask")
        server = _replace(server, style="answer", writes=(), pauses=())
    elif kind < 0.55:
        ends = ["finish", rng.choice(POLITE_ENDS)]
        rng.shuffle(ends)
        client = _replace(client, end=ends[0])
        server = _replace(server, end=ends[1])
    is_waited_for = "follow" in {client.end, server.end}
    if rng.random() < 0.22:
        # Who waits for the other one's end would wait for ever for one who reads on.
        changes["end"] = rng.choice(RUDE_ENDS[: 2 if is_waited_for else 3])
    elif rng.random() < 0.1:
        changes["cancel_step"] = rng.randint(1, 14)
    if rng.random() < 0.5:
        client = _replace(client, **changes)
    else:
        server = _replace(server, **changes)
    listener = 0 if rng.random() < 0.8 else rng.randrange(processes)
    callers = [each for each in range(processes) if each != listener]
    caller = listener if rng.random() < 0.04 or not callers else rng.choice(callers)
    # Who calls at once meets a server that nobody has announced yet.
    begin = rng.random() * pace + 0.001 if rng.random() < 0.9 else 0.0
    return Conversation(caller, listener, client, server, begin)


def _replace(script: Script, **changes: Any) -> Script:
    known = {name: getattr(script, name) for name in Script.__slots__}
    return Script(**known | changes)


class Talking:
    """One conversation in a town: its two ends, and how far it came.

    Args:
        number: From 0.
        conversation: What is done.
        flows: Of the town.
        note: Takes a line of the trace.
    """

    def __init__(
        self,
        number: int,
        conversation: Conversation,
        flows: Flows,
        note: Callable[[str], None],
    ) -> None:
        self.number = number
        self.conversation = conversation
        there, back = (flows.new(f"{number}{way}") for way in ("there", "back"))
        self.client = End(f"client {number}", there, flows, note)
        self.server = End(f"server {number}", back, flows, note)
        self.client.join(self.server)
        self.server.join(self.client)
        self.has_begun = False
        self.is_refused = False
        """Whether the call ended in an error before there was a transport."""
        self.task: asyncio.Task[Any] | None = None
        self.server_task: asyncio.Task[Any] | None = None
        self.excuses: list[str] = []
        """Why it may fail."""

    @property
    def ends(self) -> tuple[End, End]:
        """Both ends."""
        return (self.client, self.server)

    @property
    def is_over(self) -> bool:
        """Whether both programs have ended, and were told of their connections' end."""
        server = self.server
        return self.client.is_over and (server.is_over or not server.made)

    @property
    def is_complete(self) -> bool:
        """Whether everything arrived at both ends, and both were told of its end."""
        return self.client.is_complete and self.server.is_complete


class Town:
    """The programs of one world.

    Args:
        world: Where they live.
        processes: Who listens and calls.
        conversations: What they do.
    """

    def __init__(
        self,
        world: World,
        processes: list[Process],
        conversations: tuple[Conversation, ...],
    ) -> None:
        self.world = world
        self.processes = processes
        self.flows = Flows(str(world.seed))
        self.talkings = [
            Talking(number, conversation, self.flows, world.note)
            for number, conversation in enumerate(conversations)
        ]
        self.servers: dict[int, asyncio.AbstractServer] = {}
        self.is_open = True
        self._count = len(conversations) - 1
        self._by_name: dict[tuple[str, int], Talking] = {}
        self._listeners: dict[int, Any] = {}

    def open(self) -> None:
        """Listen, and begin the calls."""
        for number in {each.conversation.listener for each in self.talkings}:
            self.listen(number)
        for talking in self.talkings:
            self.begin(talking)

    def listen(self, number: int) -> None:
        """Let a process listen, as those do that are called."""
        process = self.processes[number]
        self._listeners[number] = process.listen(port=1000 + number)
        process.start(self._serve(number), "serve")

    def add(self, conversation: Conversation) -> Talking:
        """Take up one more conversation, and begin it."""
        self._count += 1
        talking = Talking(self._count, conversation, self.flows, self.world.note)
        self.talkings.append(talking)
        self.begin(talking)
        return talking

    def remove(self, talking: Talking) -> None:
        """Forget a conversation that is over."""
        self.talkings.remove(talking)
        self.flows.forget(talking.client.flow, talking.server.flow)
        for name in [name for name, who in self._by_name.items() if who is talking]:
            del self._by_name[name]

    def begin(self, talking: Talking) -> None:
        """Begin a call."""
        caller = self.processes[talking.conversation.caller]
        task = caller.start(self._call(talking, caller), f"call {talking.number}")
        talking.task = task
        task.add_done_callback(talking.client.leave)
        step = talking.conversation.client.cancel_step
        if step:
            caller.cancel_at(task, step)

    @property
    def is_over(self) -> bool:
        """Whether every program has ended."""
        for talking in self.talkings:  # noqa: SIM110  # asked after every step
            if not talking.is_over:
                return False
        return True

    def close_servers(self) -> None:
        """Accept no more callers."""
        self.is_open = False
        for number in self.servers:
            self.close_server(number)

    def end(self) -> None:
        """End every program as a cancelled one ends."""
        for talking in self.talkings:
            talking.excuses.append("ended early")
            for task in (talking.task, talking.server_task):
                if task is not None:
                    task.cancel()

    @property
    def is_quiet(self) -> bool:
        """Whether no task is left, of the programs or of the library."""
        return not any(process.waiting_tasks() for process in self.processes)

    def caller(self, name: tuple[str, int]) -> Talking | None:
        """Find the conversation of a client's socket."""
        return self._by_name.get(name)

    def parties(self, talking: Talking) -> frozenset[Process]:
        """Tell which processes a conversation is between."""
        conversation = talking.conversation
        numbers = (conversation.caller, conversation.listener)
        return frozenset(self.processes[number] for number in numbers)

    def close_server(self, number: int) -> None:
        """Accept no more callers at one process."""
        server = self.servers.get(number)
        if server is not None and self.processes[number].is_alive:
            server.close()

    # Servers

    async def _serve(self, number: int) -> None:
        process = self.processes[number]
        server = await process.loop.create_server(
            lambda: _Door(self, process), sock=self._listeners[number]
        )
        self.servers[number] = server
        if not self.is_open:
            server.close()

    def admit(self, door: _Door, process: Process, transport: Any) -> None:
        """Give a caller its program."""
        talking = self._by_name.get(transport.get_extra_info("peername"))
        if talking is None:
            transport.abort()  # the caller gave up long ago, and is forgotten
            return
        script = talking.conversation.server
        talk = self._take_over(talking.server, script, process, transport)
        del door
        task = process.start(
            self._play(talking, talking.server, script, talk, process),
            f"answer {talking.number}",
        )
        talking.server_task = task
        task.add_done_callback(talking.server.leave)
        if script.cancel_step:
            process.cancel_at(task, script.cancel_step)

    def _take_over(
        self, end: End, script: Script, process: Process, transport: Any
    ) -> Talk:
        talk: Talk = APIS[script.api](end, process.loop)
        protocol: Any = talk.protocol if isinstance(talk, StreamTalk) else talk
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if isinstance(talk, StreamTalk):
            talk.attach(transport)
        return talk

    # Clients

    async def _call(self, talking: Talking, caller: Process) -> None:
        conversation, end = talking.conversation, talking.client
        talk: Talk | None = None
        try:
            if conversation.begin:
                await pause(caller.loop, conversation.begin)
            talking.has_begun = True
            talk = await self._dial(talking, caller)
        except OSError as error:
            end.note_error(error)
        except asyncio.CancelledError:
            # Whatever was made meanwhile, the library has aborted.
            end.has_finished = end.has_closed = end.has_aborted = True
        finally:
            talking.is_refused = talk is None
        if talk is not None:
            await self._play(talking, end, conversation.client, talk, caller)

    async def _dial(self, talking: Talking, caller: Process) -> Talk:
        conversation, loop = talking.conversation, caller.loop
        script = conversation.client
        sock: Any = self.world.tcp.socket(caller.descriptors, caller.host)
        self._by_name[sock.getsockname()] = talking
        try:
            address = self._listeners[conversation.listener].name
            await loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        talk: Talk = APIS[script.api](talking.client, loop)
        protocol: Any = talk.protocol if isinstance(talk, StreamTalk) else talk
        transport, _ = await loop.create_connection(lambda: protocol, sock=sock)
        if isinstance(talk, StreamTalk):
            talk.attach(transport)
        return talk

    # Programs

    async def _play(
        self, talking: Talking, end: End, script: Script, talk: Talk, process: Process
    ) -> None:
        loop = process.loop
        patience = script.patience + talking.conversation.pauses_seconds
        timer = loop.call_later(patience, _lose_patience, end, talk)
        writer: asyncio.Task[None] | None = None
        try:
            if script.style == "duplex":
                writer = process.start(_write_all(loop, script, talk), f"{end.name} w")
                await _read_all(loop, script, talk, writer)
                await writer
            elif script.style == "ask":
                await _ask(loop, script, talk)
            else:
                await _answer(loop, script, talk)
            if script.linger:
                await pause(loop, script.linger)
        except OSError as error:
            end.note_error(error)
        except asyncio.CancelledError:
            talk.abort()
        finally:
            await self._end(end, script, talk, timer)
            if writer is not None:
                writer.cancel()
                await asyncio.wait([writer])

    @staticmethod
    async def _end(
        end: End, script: Script, talk: Talk, timer: asyncio.TimerHandle
    ) -> None:
        try:
            if not end.has_closed:
                (talk.abort if script.end == "abort" else talk.close)()
            await talk.wait_lost()
        except asyncio.CancelledError:
            talk.abort()
        finally:
            timer.cancel()


def _lose_patience(end: End, talk: Talk) -> None:
    end.is_timed_out = True
    talk.abort()


async def _write_all(
    loop: asyncio.AbstractEventLoop, script: Script, talk: Talk
) -> None:
    try:
        for number, size in enumerate(script.writes):
            if number < len(script.pauses) and script.pauses[number]:
                await pause(loop, script.pauses[number])
            if talk.end.has_closed:
                return
            talk.write(size)
            await talk.drain()
        if script.end == "finish" and not talk.end.has_closed:
            talk.write_eof()
    except OSError as error:
        talk.end.note_error(error)


async def _read_all(
    loop: asyncio.AbstractEventLoop,
    script: Script,
    talk: Talk,
    writer: asyncio.Task[None],
) -> None:
    """Read as far as the script wants to."""
    if script.end in {"close", "abort"}:
        await writer
        return
    while await talk.read(script.read_bytes):
        if script.end == "stop":
            return
        if script.read_pause:
            await pause(loop, script.read_pause)


async def _ask(loop: asyncio.AbstractEventLoop, script: Script, talk: Talk) -> None:
    """Write and read in turns."""
    for number, size in enumerate(script.writes):
        if number < len(script.pauses) and script.pauses[number]:
            await pause(loop, script.pauses[number])
        # No wait for room: who asks for more than there is room for has to read.
        talk.write(size)
        left = size
        while left and script.end != "stop":
            count = await talk.read(min(left, script.read_bytes))
            if not count:
                return
            left -= count
    if script.end in {"finish", "follow"}:
        talk.write_eof()
        while await talk.read(script.read_bytes):
            pass


async def _answer(loop: asyncio.AbstractEventLoop, script: Script, talk: Talk) -> None:
    """Write as much as was read."""
    while count := await talk.read(script.read_bytes):
        if script.end != "finish":
            return
        if script.read_pause:
            await pause(loop, script.read_pause)
        talk.write(count)
        await talk.drain()


class _Door(asyncio.Protocol):
    """The protocol of a caller until it is known who it is.

    Args:
        town: Knows the callers.
        process: Who was called.
    """

    def __init__(self, town: Town, process: Process) -> None:
        self._town = town
        self._process = process

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._town.admit(self, self._process, transport)
