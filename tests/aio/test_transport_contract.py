"""Every method of the transport in every state, with asyncio over TCP as the oracle.

No expectation is written down: each scenario runs over TCP, where the transport is
asyncio's own, and over SMC-R, and what it gave, raised and called has to be the same.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.config import Config

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

MIB = 1 << 20
MUCH = 8 * MIB
TURNS = 40
CONFIGS = {"tcp": Config(discovery=()), "smcr": Config(close_wait=60)}


async def settle() -> None:
    """Let what was begun come to its end; both ends are in this loop."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


def attempt(call: Callable[[], Any]) -> Any:
    """Give a call's result, or what it raised with its text."""
    try:
        result = call()
    except Exception as error:  # noqa: BLE001  # whatever it is, it is compared
        return f"{type(error).__name__}: {error}"
    return result


def told(end: Any) -> list[Any]:
    """What a protocol was told, with the error as code written for TCP sees it."""
    error = end.error
    standard = None
    if error is not None:
        kinds = type(error).__mro__
        standard = next(k.__name__ for k in kinds if k.__module__ == "builtins")
    return [list(end.calls), standard, getattr(error, "errno", None)]


def compare(kit: Any, scenario: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Run a scenario over both; gives what TCP gave."""
    answers = {}
    for mode, config in CONFIGS.items():

        async def run(mode: str = mode) -> Any:
            answer = await scenario(kit, mode, *args)
            # Fatal, or Exception in callback; the other words name our functions.
            problems = [c["message"].split()[0] for c in kit.problems]
            kit.problems.clear()
            return answer, problems

        answers[mode] = kit.run(run, config=config)
    over_tcp, over_smcr = answers["tcp"], answers["smcr"]
    if isinstance(over_tcp[0], dict) and over_tcp[0] != over_smcr[0]:
        pairs = {key: (over_tcp[0][key], over_smcr[0][key]) for key in over_tcp[0]}
        wrong = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        pytest.fail(
            "\n".join(f"{key}: {a}\n  not {b}" for key, (a, b) in wrong.items())
        )
    assert over_smcr == over_tcp
    return over_tcp


# --- states


async def make_open(ends: Any) -> None:
    """Nothing has happened."""


async def make_paused(ends: Any) -> None:
    ends.client.transport.pause_reading()


async def make_unread(ends: Any) -> None:
    ends.client.transport.pause_reading()
    ends.server.transport.write(b"unread")


async def make_half_closed(ends: Any) -> None:
    ends.client.transport.write_eof()


async def make_peer_half_closed(ends: Any) -> None:
    ends.server.transport.write_eof()


async def make_peer_closed(ends: Any) -> None:
    ends.server.transport.close()


async def make_peer_aborted_unread(ends: Any) -> None:
    """A reset that the client meets only when it does something."""
    ends.client.transport.pause_reading()
    ends.server.transport.pause_reading()
    ends.client.transport.write(b"never read")
    await settle()
    ends.server.transport.abort()


async def make_blocked(ends: Any) -> None:
    ends.server.transport.pause_reading()
    ends.client.transport.write(bytes(MUCH))


async def make_blocked_half_closed(ends: Any) -> None:
    await make_blocked(ends)
    ends.client.transport.write_eof()


async def make_closing(ends: Any) -> None:
    await make_blocked(ends)
    ends.client.transport.close()


async def make_closed(ends: Any) -> None:
    ends.client.transport.close()


async def make_aborted(ends: Any) -> None:
    ends.client.transport.abort()


STATES = {
    make.__name__.removeprefix("make_"): make
    for make in (
        make_open,
        make_paused,
        make_unread,
        make_half_closed,
        make_peer_half_closed,
        make_peer_closed,
        make_peer_aborted_unread,
        make_blocked,
        make_blocked_half_closed,
        make_closing,
        make_closed,
        make_aborted,
    )
}


def used_by_transport(name: str, transport: Any, *args: Any) -> None:
    """Say whether the loop refuses the descriptor of a transport that is open."""
    method = getattr(asyncio.get_running_loop(), name)
    if not transport.is_closing():
        with pytest.raises(RuntimeError, match="is used by transport"):
            method(transport.get_extra_info("socket"), *args)


CALLS: dict[str, Callable[[Any], Any]] = {
    "is_closing": lambda t: t.is_closing(),
    "is_reading": lambda t: t.is_reading(),
    "pause twice": lambda t: (t.pause_reading(), t.pause_reading(), t.is_reading()),
    "resume twice": lambda t: (t.resume_reading(), t.resume_reading(), t.is_reading()),
    "size is 0": lambda t: t.get_write_buffer_size() == 0,
    "limits": lambda t: t.get_write_buffer_limits(),
    "low alone": lambda t: (
        t.set_write_buffer_limits(low=5), t.get_write_buffer_limits(),
    ),
    "high 0": lambda t: (
        t.set_write_buffer_limits(high=0), t.get_write_buffer_limits(),
    ),
    "low above high": lambda t: t.set_write_buffer_limits(high=1, low=2),
    "negative": lambda t: t.set_write_buffer_limits(high=-1),
    "limits of text": lambda t: t.set_write_buffer_limits(high="many"),
    "can_write_eof": lambda t: t.can_write_eof(),
    "write": lambda t: t.write(b"bytes"),
    "write nothing": lambda t: t.write(b""),
    "write an empty view": lambda t: t.write(memoryview(b"")),
    "write twice": lambda t: (t.write(b"once"), t.write(b"again")),
    "write text": lambda t: t.write("text"),
    "write None": lambda t: t.write(None),
    "writelines": lambda t: t.writelines([b"a", bytearray(b"b"), memoryview(b"c")]),
    "write_eof": lambda t: t.write_eof(),
    "write_eof twice": lambda t: (t.write_eof(), t.write_eof()),
    "write_eof, write": lambda t: (t.write_eof(), t.write(b"more")),
    "write_eof, close": lambda t: (t.write_eof(), t.close()),
    "close": lambda t: t.close(),
    "close twice": lambda t: (t.close(), t.close()),
    "close, abort": lambda t: (t.close(), t.abort()),
    "close, write": lambda t: (t.close(), t.write(b"late")),
    "close, write_eof": lambda t: (t.close(), t.write_eof()),
    "close, resume": lambda t: (t.close(), t.resume_reading(), t.is_reading()),
    "abort": lambda t: t.abort(),
    "abort twice": lambda t: (t.abort(), t.abort()),
    "abort, close": lambda t: (t.abort(), t.close()),
    "abort, write": lambda t: (t.abort(), t.write(b"late")),
    "unknown info": lambda t: (
        t.get_extra_info("no such thing"), t.get_extra_info("no such thing", 7),
    ),
    "no delay": lambda t: t.get_extra_info("socket").getsockopt(
        socket.IPPROTO_TCP, socket.TCP_NODELAY
    ),
    "watched": lambda t: used_by_transport("add_reader", t, print),
    "watched no more": lambda t: used_by_transport("remove_reader", t),
    "watched for room": lambda t: used_by_transport("add_writer", t, print),
    "a new protocol": lambda t: t.set_protocol(t.get_protocol()),
}  # fmt: skip

# Where bytes are lost an end of file would be a lie, see docs/reference.
LOSSY = {
    (state, call)
    for state, call in itertools.product(STATES, CALLS)
    if state.startswith(("blocked", "closing")) and "abort" in call
}


FAULTY = {
    (state, "writelines")
    for state in ("half_closed", "blocked_half_closed", "closing", "closed", "aborted")
    if sys.version_info >= (3, 12)
}
"""Where stock asyncio raises from within, or names another method."""


async def call_in_state(kit: Any, mode: str, state: str, call: str) -> list[Any]:
    def keeps_open() -> Any:
        return kit.Recorder(keep_open=True)

    async with kit.connected(keeps_open, keeps_open) as ends:
        client = ends.client.transport
        assert client.get_extra_info("smc").mode == mode
        await STATES[state](ends)
        await settle()
        answer = [attempt(lambda: CALLS[call](client))]
        answer += [client.is_closing(), client.is_reading()]
        await settle()
        answer += [told(ends.client)]
        if (state, call) not in LOSSY:
            answer += [told(ends.server)]
        client.resume_reading()
        await settle()
        client.close()
        ends.server.transport.resume_reading()
        await ends.client.until_call("lost")
        await settle()
        ends.server.transport.close()
        await ends.server.until_call("lost")
        answer += [told(ends.client), bytes(ends.client.data)]
        if (state, call) not in LOSSY:
            answer += [told(ends.server), len(ends.server.data)]
        return answer


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_every_method_in_every_state(kit, state) -> None:
    async def all_calls(kit: Any, mode: str) -> dict[str, Any]:
        calls = [call for call in CALLS if (state, call) not in FAULTY]
        return {call: await call_in_state(kit, mode, state, call) for call in calls}

    compare(kit, all_calls)


def test_there_are_enough_of_them() -> None:
    assert len(STATES) * len(CALLS) == 12 * 39
