"""A small eBPF machine: runs a program's bytes, strictly, in either byte order.

It shares nothing with the assembler but RFC 9669. What a verifier would refuse is an
error: a register that was not written, memory outside of what a pointer leads to, a
stack slot that was not filled, a backward jump, arguments used after a call.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

MASK = (1 << 64) - 1
STACK_BYTES = 512
SPACING = 1 << 32
"""Between the addresses of two regions, so that no offset leads to another one."""


class Refused(Exception):
    """A verifier would not have let this program run."""


@dataclass(eq=False)
class Region:
    """Memory that a pointer leads to; None is a byte that was not written."""

    name: str
    data: list[int | None]

    @classmethod
    def of(cls, name: str, data: bytes) -> Region:
        return cls(name, list(data))

    def bytes(self) -> bytes:
        return bytes(byte or 0 for byte in self.data)


@dataclass(eq=False)
class Machine:
    """Runs programs; knows where all regions are."""

    byteorder: Any
    helpers: Mapping[int, Callable[..., int]] = field(default_factory=dict)
    _regions: list[Region] = field(default_factory=list)

    def address(self, region: Region) -> int:
        """Give the address of a region's first byte; 8-byte aligned, never 0."""
        for number, known in enumerate(self._regions, start=1):
            if known is region:
                return number * SPACING
        self._regions.append(region)
        return len(self._regions) * SPACING

    def find(self, address: int) -> tuple[Region, int]:
        """Tell where an address leads to: the region, and the offset in it."""
        number, offset = divmod(address + SPACING // 2, SPACING)
        if not 1 <= number <= len(self._regions):
            raise Refused(f"0x{address:x} is no pointer")
        return self._regions[number - 1], offset - SPACING // 2

    def read(self, address: int, size: int) -> bytes:
        region, offset = self.find(address)
        part = region.data[offset : offset + size] if offset >= 0 else []
        if len(part) != size or None in part:
            raise Refused(f"reads {size} bytes at {region.name}[{offset}]")
        return bytes(byte or 0 for byte in part)

    def write(self, address: int, data: bytes) -> None:
        region, offset = self.find(address)
        if offset < 0 or offset + len(data) > len(region.data):
            raise Refused(f"writes {len(data)} bytes at {region.name}[{offset}]")
        region.data[offset : offset + len(data)] = data

    def number(self, address: int, size: int) -> int:
        return int.from_bytes(self.read(address, size), self.byteorder)

    def run(self, code: bytes, context: Region) -> int:
        """Run a program to its end; gives r0."""
        return _Run(self, code, context).result()


SIZES = {0x00: 4, 0x08: 2, 0x10: 1, 0x18: 8}


class _Run:
    """One run of one program."""

    def __init__(self, machine: Machine, code: bytes, context: Region) -> None:
        assert len(code) % 8 == 0
        self.machine = machine
        self.code = code
        # Below the stack's top there is the stack, above it nothing.
        stack = Region("stack", [None] * STACK_BYTES)
        self.registers: list[int | None] = [None] * 11
        self.registers[1] = machine.address(context)
        self.registers[10] = machine.address(stack) + STACK_BYTES
        self.at = 0

    def instruction(self, number: int) -> tuple[int, int, int, int, int]:
        little = self.machine.byteorder == "little"
        layout = "<BBhi" if little else ">BBhi"
        opcode, both, offset, value = struct.unpack_from(layout, self.code, number * 8)
        low, high = both & 15, both >> 4
        to, source = (low, high) if little else (high, low)
        return opcode, to, source, offset, value

    def get(self, number: int) -> int:
        value = self.registers[number]
        if value is None:
            raise Refused(f"instruction {self.at} reads r{number}, which has no value")
        return value

    def result(self) -> int:
        for _ in range(len(self.code) // 8):
            opcode, to, source, offset, value = self.instruction(self.at)
            if opcode == 0x95:
                return self.get(0)
            self.step(opcode, to, source, offset, value)
            self.at += 1
        raise Refused("the program does not come to its end")

    def step(self, opcode: int, to: int, source: int, offset: int, value: int) -> None:
        kind = opcode & 0x07
        if opcode == 0x18:
            self.load_64(to, source, value)
        elif opcode == 0x85:
            self.call(value)
        elif kind in (0x05, 0x06):
            self.jump(opcode, to, source, offset, value)
        elif kind == 0x07:
            self.calculate(opcode, to, source, value)
        elif kind == 0x01:
            size = SIZES[opcode & 0x18]
            self.registers[to] = self.machine.number(self.get(source) + offset, size)
        elif kind == 0x03:
            size = SIZES[opcode & 0x18]
            data = (self.get(source) & ((1 << 8 * size) - 1)).to_bytes(
                size, self.machine.byteorder
            )
            where = self.get(to) + offset
            if to == 10 and (offset % 8 or size != 8):
                raise Refused(f"instruction {self.at} writes a part of a stack slot")
            self.machine.write(where, data)
        else:
            raise Refused(f"instruction {self.at} has opcode 0x{opcode:02x}")

    def load_64(self, to: int, source: int, low: int) -> None:
        opcode, *rest, high = self.instruction(self.at + 1)
        assert (opcode, *rest) == (0, 0, 0, 0)
        number = (low & 0xFFFFFFFF) | (high & 0xFFFFFFFF) << 32
        if source == 1:  # the descriptor of a map
            assert high == 0
        else:
            assert source == 0
        self.registers[to] = number
        self.at += 1

    def calculate(self, opcode: int, to: int, source: int, value: int) -> None:
        right = self.get(source) if opcode & 0x08 else value & MASK
        match opcode & 0xF0:
            case 0xB0:
                result = right
            case 0x00:
                result = self.get(to) + right
            case 0x40:
                result = self.get(to) | right
            case 0x50:
                result = self.get(to) & right
            case other:
                raise Refused(f"instruction {self.at}: operation 0x{other:02x}")
        self.registers[to] = result & MASK

    def jump(self, opcode: int, to: int, source: int, offset: int, value: int) -> None:
        if offset < 0:
            raise Refused(f"instruction {self.at} jumps backwards")
        if opcode == 0x05 or self.holds(opcode, to, source, value):
            self.at += offset

    def holds(self, opcode: int, to: int, source: int, value: int) -> bool:
        bits = 64 if opcode & 0x07 == 0x05 else 32
        mask = (1 << bits) - 1
        left = self.get(to) & mask
        right = (self.get(source) if opcode & 0x08 else value) & mask
        half = 1 << (bits - 1)
        match opcode & 0xF0:
            case 0x10:
                return left == right
            case 0x20:
                return left > right
            case 0x30:
                return left >= right
            case 0x40:
                return bool(left & right)
            case 0x50:
                return left != right
            case 0xC0:
                return (left ^ half) < (right ^ half)
            case other:
                raise Refused(f"instruction {self.at}: condition 0x{other:02x}")

    def call(self, number: int) -> None:
        if number not in self.machine.helpers:
            raise Refused(f"instruction {self.at} calls {number}")
        helper = self.machine.helpers[number]
        arguments = [self.registers[n] for n in range(1, 6)]
        self.registers[0] = helper(*arguments) & MASK
        self.registers[1:6] = [None] * 5
