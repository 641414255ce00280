"""Single instructions in bytes, labels, and what is refused."""

from __future__ import annotations

from enum import IntEnum, IntFlag

import pytest

from pysmc.discovery.option.assembler import Assembler, Field, Register

R0, R1, R2 = Register.R0, Register.R1, Register.R2
R10 = Register.R10


class Help(IntEnum):
    MAP_LOOKUP_ELEM = 1


class Bit(IntFlag):
    LOW = 1
    HIGH = 2


def one(write, byteorder="little", maps=None):
    a = Assembler(byteorder)
    write(a)
    program = a.program()
    lines = program.listing().split("\n")
    words = [line[7:] for line in lines if line[4:5].isdigit()]
    return program.code(maps or {}).hex(), words


@pytest.mark.parametrize(
    ("write", "little", "big", "words"),
    [
        (lambda a: a.move(R1, R2), "bf21000000000000", "bf12000000000000", "r1 = r2"),
        (lambda a: a.move(R1, -2), "b7010000feffffff", "b7100000fffffffe", "r1 = -2"),
        (
            lambda a: a.add(R1, 70000),
            "0701000070110100",
            "0710000000011170",
            "r1 += 0x11170",
        ),
        (
            lambda a: a.bit_or(R1, Bit(3)),
            "4701000003000000",
            "4710000000000003",
            "r1 |= LOW|HIGH",
        ),
        (
            lambda a: a.bit_or(R1, R2),
            "4f21000000000000",
            "4f12000000000000",
            "r1 |= r2",
        ),
        (
            lambda a: a.bit_and(R1, Bit(0)),
            "5701000000000000",
            "5710000000000000",
            "r1 &= 0x0",
        ),
        (
            lambda a: a.load(R1, R2, Field("f", 4, 4)),
            "6121040000000000",
            "6112000400000000",
            "r1 = r2->f",
        ),
        (
            lambda a: a.load(R1, R2, Field("g", 8, 8)),
            "7921080000000000",
            "7912000800000000",
            "r1 = r2->g",
        ),
        (
            lambda a: a.store(R10, Field("s", -8, 8), R1),
            "7b1af8ff00000000",
            "7ba1fff800000000",
            "r10->s = r1",
        ),
        (
            lambda a: a.store(R2, Field("f", 4, 4), R1),
            "6312040000000000",
            "6321000400000000",
            "r2->f = r1",
        ),
        (
            lambda a: a.call(Help.MAP_LOOKUP_ELEM),
            "8500000001000000",
            "8500000000000001",
            "r0 = map_lookup_elem()",
        ),
        (lambda a: a.leave(), "9500000000000000", "9500000000000000", "exit"),
        (
            lambda a: a.load_bytes(R1, b"\xfe\x06"),
            "18010000fe060000" + "00" * 8,
            "1810000000000000" + "00000000fe060000",
            "r1 = the bytes fe 06",
        ),
        (
            lambda a: a.load_u32(R1, 5),
            "1801000005000000" + "00" * 8,
            "1810000000000000" + "0000000000000005",
            "r1 = 5 in the first 4 bytes",
        ),
        (
            lambda a: a.load_map(R1, "m"),
            "1811000009000000" + "00" * 8,
            "1811000000000009" + "00" * 8,
            "r1 = map m",
        ),
    ],
)
def test_an_instruction(write, little, big, words):
    assert one(write, "little", {"m": 9}) == (little, [words])
    assert one(write, "big", {"m": 9}) == (big, [words])


def labelled(write):
    """Write a jump to a label behind two more instructions."""

    def both(a):
        write(a)
        a.move(R0, 0)
        a.label("there")
        a.leave()

    return one(both)


@pytest.mark.parametrize(
    ("write", "code", "words"),
    [
        (lambda a: a.jump("there"), "0500010000000000", "goto there"),
        (
            lambda a: a.jump_if(R1, "==", 7, "there"),
            "1501010007000000",
            "if r1 == 7 goto there",
        ),
        (
            lambda a: a.jump_if(R1, "!=", R2, "there"),
            "5d21010000000000",
            "if r1 != r2 goto there",
        ),
        (
            lambda a: a.jump_if(R1, ">", R2, "there"),
            "2d21010000000000",
            "if r1 > r2 goto there",
        ),
        (
            lambda a: a.jump_if(R1, ">=", 1, "there"),
            "3501010001000000",
            "if r1 >= 1 goto there",
        ),
        (
            lambda a: a.jump_if(R1, "&", Bit.HIGH, "there"),
            "4501010002000000",
            "if r1 & HIGH goto there",
        ),
        (
            lambda a: a.jump_if(R1, "s<", 0, "there"),
            "c501010000000000",
            "if r1 s< 0 goto there",
        ),
        (
            lambda a: a.jump_if(R1, "!=", -1, "there", bits=32),
            "56010100ffffffff",
            "if r1 != -1 (32 bits) goto there",
        ),
    ],
)
def test_a_jump(write, code, words):
    found, listing = labelled(write)
    assert found[:16] == code
    assert listing[0] == words


def test_a_label_that_is_missing_or_behind():
    for label in ("nowhere", "behind"):
        a = Assembler("little")
        a.label("behind")
        a.jump(label)
        with pytest.raises(ValueError, match=f"label {label} does not come later"):
            a.program()


def test_a_label_that_is_there_twice():
    a = Assembler("little")
    a.label("there")
    with pytest.raises(ValueError, match="there twice"):
        a.label("there")


def test_a_map_that_is_missing():
    a = Assembler("little")
    a.load_map(R1, "m")
    with pytest.raises(KeyError):
        a.program().code({})


def test_the_listing():
    a = Assembler("little")
    a.rule("Why.\n   And why more.")
    a.load_map(R1, "m")
    a.label("end")
    a.rule("Because.")
    a.leave()
    assert a.program().listing().splitlines() == [
        "",
        "; Why.",
        "; And why more.",
        "    0  r1 = map m",
        "",
        "end:",
        "; Because.",
        "    2  exit",
    ]
