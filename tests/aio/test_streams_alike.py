"""Whatever a program does, our reader does what asyncio's does."""

from __future__ import annotations

import asyncio
import sys
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pysmc
from pysmc.aio import streams
from tests.aio.streams_player import play

HAS_TUPLES = sys.version_info >= (3, 13)

pieces = st.lists(st.sampled_from([b"a", b";", b"\n"]), max_size=12).map(b"".join)
separators: st.SearchStrategy[Any] = st.sampled_from(
    [b"\n", b";", b"a\n", b"\n\n", b";a;", b"a\na\na", b""]
)
if HAS_TUPLES:
    separators |= st.lists(separators, max_size=3).map(tuple)
feeding = st.tuples(st.just("feed"), pieces | pieces.map(bytearray))
reading = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 12)),
    st.tuples(st.just("readexactly"), st.integers(-1, 12)),
    st.tuples(st.just("readuntil"), separators),
    st.tuples(st.just("readline"), st.none()),
)
steps = st.one_of(
    feeding,
    feeding,
    reading,
    st.tuples(st.just("settle"), st.none()),
    st.tuples(st.just("cancel"), st.integers(0, 3)),
)
ends = st.tuples(st.sampled_from(["eof", "exception", "settle"]), st.none())
to_the_end = st.just(("read", -1))


@st.composite
def scripts(draw: st.DrawFn) -> list[Any]:
    """A long life, perhaps an end, and what is done around it."""
    script = draw(st.lists(steps, min_size=4, max_size=40))
    script += draw(st.lists(to_the_end, max_size=1))
    script += draw(st.lists(feeding, max_size=2))
    script.append(draw(ends))
    return script + draw(st.lists(reading | to_the_end, max_size=4))


@pytest.mark.slow
@pytest.mark.timeout(300)  # nightly it plays 3,000 scripts
@settings(max_examples=max(300, settings().max_examples))
@given(
    script=scripts(),
    limit=st.integers(1, 12) | st.just(streams.STREAM_LIMIT),
    can_pause=st.booleans(),
    small=st.sampled_from([0, 3, streams.SMALL_BYTES]),
    grown=st.sampled_from([4, streams.GROWN_BYTES]),
)
@example(  # a separator over three chunks, the middle one shorter than it
    script=[
        ("feed", b"aa;"), ("feed", b"a"), ("feed", b";a"), ("readuntil", b";a;"),
        ("settle", None),
    ],
    limit=25, can_pause=True, small=0, grown=4,
)  # fmt: skip
@example(  # two readers at once
    script=[("readexactly", 5), ("settle", None), ("readline", None), ("settle", None)],
    limit=25, can_pause=True, small=0, grown=4,
)  # fmt: skip
def test_every_script_gives_what_asyncio_gives(
    script, limit, can_pause, small, grown
) -> None:
    wanted = play(asyncio.StreamReader, script, limit, can_pause=can_pause)
    with (
        mock.patch.object(streams, "SMALL_BYTES", small),
        mock.patch.object(streams, "GROWN_BYTES", grown),
    ):
        found = play(pysmc.StreamReader, script, limit, can_pause=can_pause)
    assert found == wanted


def test_the_player_sees_a_difference() -> None:
    class Wrong(asyncio.StreamReader):
        async def readline(self) -> bytes:
            return (await super().readline()).strip()

    script = [("feed", b"a\n"), ("readline", None), ("settle", None)]
    assert play(Wrong, script, 9) != play(asyncio.StreamReader, script, 9)


@given(
    data=st.lists(pieces, max_size=8),
    several=st.lists(
        st.sampled_from([b"\n", b";", b"a\n", b"\n\n", b";a;", b"a\na"]),
        min_size=1, max_size=4,
    ),
    small=st.sampled_from([0, 3, streams.SMALL_BYTES]),
)  # fmt: skip
def test_of_several_separators_the_one_that_ends_first(data, several, small) -> None:
    whole = b"".join(data)
    ends = [
        end for end in range(len(whole) + 1) if whole[:end].endswith(tuple(several))
    ]

    async def main() -> bytes:
        reader = pysmc.StreamReader()
        for piece in data:
            reader.feed_data(piece)
        reader.feed_eof()
        return await reader.readuntil(tuple(several))

    with mock.patch.object(streams, "SMALL_BYTES", small), asyncio.Runner() as runner:
        if ends:
            assert runner.run(main()) == whole[: ends[0]]
        else:
            with pytest.raises(asyncio.IncompleteReadError) as caught:
                runner.run(main())
            assert caught.value.partial == whole
