"""Names, kinds and versions of what is loaded."""

from __future__ import annotations

import errno
from contextlib import ExitStack

import pytest

from pysmc.discovery.option.bpf import BpfError
from pysmc.discovery.option.loading import PARTS, load, part_of


def test_the_parts(fake, bpf, machine):
    with ExitStack() as stack:
        loaded = load(stack, bpf, machine)
        assert [one.part for one in loaded] == list(PARTS)
        assert [bpf.program_info(one.descriptor).name for one in loaded] == [
            "pysmc1_sock_ops", "pysmc1_getopt", "pysmc1_setopt",
        ]  # fmt: skip
        assert [bpf.program_info(one.descriptor).tag for one in loaded] == [
            one.tag for one in loaded
        ]
        assert len(fake.leaked()) == 6
    assert fake.leaked() == []


@pytest.mark.parametrize(
    ("command", "turn"),
    [
        ("BTF_LOAD", 0),
        ("MAP_CREATE", 0),
        ("MAP_CREATE", 1),
        ("PROG_LOAD", 0),
        ("PROG_LOAD", 2),
    ],
)
def test_nothing_stays_open_after_a_failure(fake, bpf, machine, command, turn):
    fake.fails[command] = [None] * turn + [errno.ENOMEM]
    with pytest.raises(BpfError), ExitStack() as stack:
        load(stack, bpf, machine)
    assert fake.leaked() == []


@pytest.mark.parametrize("part", PARTS)
def test_a_program_is_known_by_its_name(part):
    assert len(part.label) <= 15
    assert part_of(part.label) == (part, 1)
    assert part_of(f"pysmc27_{part.short}") == (part, 27)


@pytest.mark.parametrize(
    "name", ["", "pysmc", "sock_ops", "pysmc_sock_ops", "pysmcx_setopt", "1_getopt"]
)
def test_other_names(name):
    assert part_of(name) is None
