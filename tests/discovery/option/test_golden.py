"""Every byte of the programs, in both byte orders, beside the listing.

What the kernel will run is reviewed as text: a change of a program changes its file in
``golden/``. To write them anew: ``python tests/discovery/option/test_golden.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from pysmc.discovery.option.loading import assemble
from pysmc.discovery.option.machine import Machine
from pysmc.discovery.option.programs import LISTENERS, SOCKETS

GOLDEN = Path(__file__).parent / "golden"
MAPS = {SOCKETS: 0x11, LISTENERS: 0x22}
COUNTS = {"sock_ops": 451, "getsockopt": 55, "setsockopt": 44}
"""Instructions; the kernel takes a million, and old ones 4096."""
LITTLE = assemble(Machine("x86_64", 64, "little", 4096))
BIG = assemble(Machine("s390x", 64, "big", 4096))


def rendered(name: str) -> str:
    """A program as its golden file has it: bytes of both byte orders, then words."""
    little, big = LITTLE[name].code(MAPS), BIG[name].code(MAPS)
    lines = []
    for line in LITTLE[name].listing().splitlines():
        number, _, words = line.strip().partition("  ")
        if not number.isdecimal():
            lines.append(line)
            continue
        at = int(number) * 8
        # What loads 64 bits is two instructions of 8 bytes and one line.
        size = 16 if little[at] == 0x18 else 8
        both = (code[at : at + size].hex() for code in (little, big))
        lines.append("  ".join([f"{number:>5}", *both, words]))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", COUNTS)
def test_bytes_and_listing(name):
    assert rendered(name) == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", COUNTS)
def test_every_instruction_is_in_the_file(name):
    shown = [
        line.split()[1] for line in rendered(name).splitlines() if line[4:5].isdigit()
    ]
    assert "".join(shown) == LITTLE[name].code(MAPS).hex()
    for programs in (LITTLE, BIG):
        assert len(programs[name].instructions) == COUNTS[name]
        assert len(programs[name].code(MAPS)) == COUNTS[name] * 8


@pytest.mark.parametrize("name", COUNTS)
def test_the_listing_is_the_same_for_both_byte_orders(name):
    assert LITTLE[name].listing() == BIG[name].listing()


@pytest.mark.parametrize("name", COUNTS)
def test_every_block_has_its_rule(name):
    lines = LITTLE[name].listing().splitlines()
    longest = run = 0
    for line in lines:
        run = run + 1 if line.strip()[:1].isdigit() else 0
        longest = max(longest, run)
    assert longest <= 24


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for program in COUNTS:
        (GOLDEN / f"{program}.txt").write_text(rendered(program))
