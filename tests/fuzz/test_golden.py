"""Golden messages with every value in every byte, and the longest inputs there are.

Flipped bits and prefixes of golden messages are in `tests/proto/test_vectors.py`; here
each byte takes all of its 256 values, against the second reader.
"""

from __future__ import annotations

import sys
import timeit
from bisect import bisect_right
from itertools import accumulate

import pytest

from smcproto import clc, llc
from smcproto.constants import PathType
from smcproto.decode import decode
from smcproto.errors import DecodeError
from tests.fuzz import kit, targets_wire

PLANES = {"clc": "clc", "llc": "llc", "cdc": "cdc", "tcp-option": "tcp_option"}
LONGEST = 65_535
FACTOR = 3
ROUNDS = 5


@pytest.mark.fuzz
@pytest.mark.slow
@pytest.mark.parametrize("name", PLANES)
def test_every_value_of_every_byte_of_every_golden_message(name, long_run):
    target = kit.load(name)
    messages = targets_wire.vectors(PLANES[name])
    ends = list(accumulate(256 * len(data) for data in messages))
    total = ends[-1]
    with long_run(f"golden-{name}", small=4_000, full=total) as run:
        stride = max(1, total // run.count)
        for seed in run.seeds():
            case = (seed * stride + run.rotate(stride)) % total
            number = bisect_right(ends, case)
            at, value = divmod(case - (ends[number] - 256 * len(messages[number])), 256)
            data = bytearray(messages[number])
            data[at] = value
            try:
                target.run(bytes(data))
            except AssertionError as fault:
                run.fail(f"{kit.reproduce(name, bytes(data))}: {fault}")
        run.add(inputs=run.count)


def largest_legal_messages() -> list[bytes]:
    proposal = clc.Proposal(
        version=2,
        peer_id=bytes(8),
        gid=bytes(16),
        mac=bytes(6),
        typev1=PathType.BOTH,
        typev2=PathType.BOTH,
        ip_area=clc.IpArea(ipv6_prefixes=(clc.Ipv6Prefix(bytes(16), 64),) * 8),
        v2=clc.ProposalExtension(
            eids=("A" * 32,) * 8,
            release=1,
            gid=bytes(16),
            smcd=clc.SmcdExtension("S" * 32, (clc.IsmGid(1, 2),) * 8),
        ),
    )
    keys = tuple(llc.RkeyPair(n, n, n) for n in range(255))
    link = llc.AddLink(2, False, bytes(6), bytes(16), 1, 1, 1, 1, rkeys=keys,
                       client_target_gid=bytes(16))  # fmt: skip
    return [proposal.build(), link.build()]


def best(parse, data: bytes) -> float:
    def call() -> None:
        try:
            parse(data)
        except DecodeError:
            return

    return min(timeit.repeat(call, number=1, repeat=ROUNDS))


@pytest.mark.slow
def test_no_input_of_64_kib_takes_longer_than_the_largest_message():
    """Whatever the bytes: those that fuzzing found, made as long as can be.

    `tests/proto/test_timing.py` holds the largest messages themselves to a bound in
    microseconds; here they are the measure, so that it is the same on every machine.
    """
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        proposal, link = largest_legal_messages()
        bound = FACTOR * max(best(clc.parse, proposal), best(llc.parse, link))
        slow = []
        parsers = {
            "clc": clc.parse,
            "llc": llc.parse,
            "decode": decode,
        }
        for name, parse in parsers.items():
            for data in [*kit.corpus(name), *kit.load(name).seeds()]:
                long = data * (LONGEST // len(data) + 1) if data else bytes(LONGEST)
                if best(parse, long[:LONGEST]) > bound:
                    slow.append((name, data.hex()))
    finally:
        sys.settrace(tracer)
    assert not slow
