"""An assembler for eBPF: instructions with names, labels, rules in words, a listing.

Decides how an instruction is written in bytes, for either byte order, and knows nothing
of what a program is for. A program is text: every block begins with the rule that it
renders, and `Program.listing` prints rules and instructions side by side, so that
an administrator can read what the kernel will run.

Source: RFC 9669 (BPF instruction set); kernel counterpart: include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Assembler", "ByteOrder", "Field", "Instruction", "Program", "Register"]

ByteOrder = Literal["little", "big"]


class Register(IntEnum):
    """The registers; r0 is a result, r1 to r5 are arguments, r10 is the stack's top."""

    R0 = 0
    R1 = 1
    R2 = 2
    R3 = 3
    R4 = 4
    R5 = 5
    R6 = 6
    R7 = 7
    R8 = 8
    R9 = 9
    R10 = 10

    def __str__(self) -> str:
        return f"r{self.value}"


class Field(NamedTuple):
    """A member of a structure that a program reads or writes."""

    name: str
    offset: int
    """In bytes, from where the register points to."""
    size: Literal[4, 8]
    """In bytes."""


_SIZE: Final = {4: 0x00, 8: 0x18}
_LOAD, _STORE, _LOAD_64 = 0x61, 0x63, 0x18
_CALL, _EXIT, _JUMP, _JUMP_32 = 0x85, 0x95, 0x05, 0x06
_FROM_REGISTER = 0x08
_MAP = 1
"""In the place of a source register: the value is the descriptor of a map."""

_ARITHMETIC: Final = {"=": 0xB7, "+=": 0x07, "|=": 0x47, "&=": 0x57}
_CONDITIONS: Final = {
    "==": 0x10, ">": 0x20, ">=": 0x30, "&": 0x40, "!=": 0x50, "s<": 0xC0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction of 8 bytes; what loads 64 bits is two of them."""

    opcode: int
    """8 bits."""
    to: int = 0
    """4 bits: the register that changes, or the left side of a condition."""
    source: int = 0
    """4 bits: the register that is read."""
    offset: int = 0
    """16 bits, signed: in bytes, or in instructions from the next one."""
    value: int = 0
    """32 bits, signed: the constant, or the number of a function."""
    words: str = ""
    """For the listing; empty in the second half of 64 bits."""

    def encode(self, byteorder: ByteOrder) -> bytes:
        """Write it for a machine: numbers, and the two registers' order, differ."""
        if byteorder == "little":
            registers = self.source << 4 | self.to
        else:
            registers = self.to << 4 | self.source
        layout = "<BBhi" if byteorder == "little" else ">BBhi"
        return struct.pack(layout, self.opcode, registers, self.offset, self.value)


@dataclass(frozen=True, slots=True)
class Program:
    """What was assembled; only the descriptors of its maps are still open."""

    byteorder: ByteOrder
    instructions: tuple[Instruction, ...]
    maps: Mapping[int, str]
    """Number of an instruction: name of the map that it loads."""
    notes: Mapping[int, tuple[str, ...]]
    """Number of an instruction: lines of the listing above it."""

    def code(self, maps: Mapping[str, int]) -> bytes:
        """Write all bytes.

        Args:
            maps: The descriptor of each map, by its name.

        Raises:
            KeyError: One is missing.
        """
        encoded = bytearray()
        for number, one in enumerate(self.instructions):
            if number in self.maps:
                found = maps[self.maps[number]]
                loads = Instruction(one.opcode, one.to, _MAP, 0, found)
                encoded += loads.encode(self.byteorder)
            else:
                encoded += one.encode(self.byteorder)
        return bytes(encoded)

    def listing(self) -> str:
        """Print rules, labels and numbered instructions for people."""
        lines: list[str] = []
        for number, one in enumerate(self.instructions):
            lines += self.notes.get(number, ())
            if one.words:
                lines.append(f"{number:5}  {one.words}")
        return "\n".join(lines) + "\n"


def _word(value: int) -> str:
    """Give a member of an enumeration its name, a big number its usual form."""
    if isinstance(value, Register):
        return str(value)
    if isinstance(value, IntEnum | IntFlag):
        return value.name or hex(value)
    return str(value) if abs(value) < 1 << 16 else hex(value)


@dataclass(slots=True)
class Assembler:
    """Collects instructions; `program` resolves the labels."""

    byteorder: ByteOrder
    _instructions: list[Instruction] = field(default_factory=list)
    _labels: dict[str, int] = field(default_factory=dict)
    _jumps: dict[int, str] = field(default_factory=dict)
    _maps: dict[int, str] = field(default_factory=dict)
    _notes: dict[int, list[str]] = field(default_factory=dict)

    def rule(self, text: str) -> None:
        """Say what the following instructions are there for."""
        above = self._notes.get(len(self._instructions))
        # A label stands right above the rule of its block.
        lines = (f"; {line.strip()}" for line in text.strip().splitlines())
        self._note(*([] if above else [""]), *lines)

    def label(self, name: str) -> None:
        """Name the place of the next instruction.

        Raises:
            ValueError: There is such a label.
        """
        if name in self._labels:
            message = f"label {name} is there twice"
            raise ValueError(message)
        self._labels[name] = len(self._instructions)
        above = self._notes.get(len(self._instructions))
        self._note(*([] if above else [""]), f"{name}:")

    def _note(self, *lines: str) -> None:
        self._notes.setdefault(len(self._instructions), []).extend(lines)

    def _add(self, one: Instruction) -> None:
        self._instructions.append(one)

    # --- values ------------------------------------------------------------------

    def move(self, to: Register, source: Register | int) -> None:
        """Copy a register or a constant of 32 bits, sign-extended to 64."""
        self._calculate(to, "=", source)

    def add(self, to: Register, value: Register | int) -> None:
        """Add a register or a constant."""
        self._calculate(to, "+=", value)

    def bit_or(self, to: Register, source: Register | int) -> None:
        """Set bits."""
        self._calculate(to, "|=", source)

    def bit_and(self, to: Register, value: int) -> None:
        """Keep bits."""
        self._calculate(to, "&=", value)

    def _calculate(self, to: Register, operator: str, source: Register | int) -> None:
        opcode = _ARITHMETIC[operator]
        words = f"{to} {operator} {_word(source)}"
        if isinstance(source, Register):
            self._add(Instruction(opcode | _FROM_REGISTER, to, source, words=words))
        else:
            self._add(Instruction(opcode, to, value=source, words=words))

    def load_bytes(self, to: Register, data: bytes) -> None:
        """Load up to 8 bytes so that a store of 8 puts them into memory in this order.

        Two instructions. One store for all of an 8-byte slot of the stack: written in
        pieces, it costs CAP_PERFMON on Linux 6.1 ("corrupt spilled pointer on stack").
        """
        number = int.from_bytes(data.ljust(8, b"\0"), self.byteorder)
        self._load_64(to, number, f"{to} = the bytes {data.hex(' ')}")

    def load_u32(self, to: Register, number: int) -> None:
        """Load a number so that a store of 8 bytes puts it into the first 4."""
        data = number.to_bytes(4, self.byteorder).ljust(8, b"\0")
        value = int.from_bytes(data, self.byteorder)
        self._load_64(to, value, f"{to} = {number} in the first 4 bytes")

    def load_u64(self, to: Register, number: int) -> None:
        """Load a number of 64 bits; two instructions."""
        self._load_64(to, number, f"{to} = {number}")

    def load_map(self, to: Register, name: str) -> None:
        """Load the address of a map; two instructions."""
        self._maps[len(self._instructions)] = name
        self._load_64(to, 0, f"{to} = map {name}")

    def _load_64(self, to: Register, number: int, words: str) -> None:
        low, high = struct.unpack("<ii", struct.pack("<Q", number))
        self._add(Instruction(_LOAD_64, to, value=low, words=words))
        self._add(Instruction(0, value=high))

    # --- memory ------------------------------------------------------------------

    def load(self, to: Register, base: Register, member: Field) -> None:
        """Read a member of a structure; 4 bytes are extended with zeros."""
        words = f"{to} = {base}->{member.name}"
        opcode = _LOAD | _SIZE[member.size]
        self._add(Instruction(opcode, to, base, member.offset, words=words))

    def store(self, base: Register, member: Field, source: Register) -> None:
        """Write a member of a structure."""
        words = f"{base}->{member.name} = {source}"
        opcode = _STORE | _SIZE[member.size]
        self._add(Instruction(opcode, base, source, member.offset, words=words))

    # --- flow --------------------------------------------------------------------

    def jump(self, label: str) -> None:
        """Go on at a label, which must come later."""
        self._jumps[len(self._instructions)] = label
        self._add(Instruction(_JUMP, words=f"goto {label}"))

    def jump_if(
        self,
        left: Register,
        condition: str,
        right: Register | int,
        label: str,
        *,
        bits: Literal[32, 64] = 64,
    ) -> None:
        """Go on at a label if a comparison holds; ``&`` asks for a common bit.

        Args:
            left: What is compared.
            condition: ``==``, ``!=``, ``>``, ``>=`` (unsigned), ``s<`` (signed), ``&``.
            right: With what; a constant is sign-extended.
            label: Must come later.
            bits: How many of them count.
        """
        opcode = _CONDITIONS[condition] | (_JUMP if bits == 64 else _JUMP_32)
        half = "" if bits == 64 else " (32 bits)"
        words = f"if {left} {condition} {_word(right)}{half} goto {label}"
        self._jumps[len(self._instructions)] = label
        if isinstance(right, Register):
            self._add(Instruction(opcode | _FROM_REGISTER, left, right, words=words))
        else:
            self._add(Instruction(opcode, left, value=right, words=words))

    def call(self, function: IntEnum) -> None:
        """Call a helper of the kernel: arguments in r1 to r5, result in r0."""
        words = f"r0 = {function.name.lower()}()"
        self._add(Instruction(_CALL, value=int(function), words=words))

    def leave(self) -> None:
        """End the program; its answer is in r0."""
        self._add(Instruction(_EXIT, words="exit"))

    def program(self) -> Program:
        """Resolve the labels.

        Raises:
            ValueError: A label is missing, or a jump goes backwards.
        """
        for number, label in self._jumps.items():
            distance = self._labels.get(label, -1) - number - 1
            if distance < 0:
                message = f"instruction {number}: label {label} does not come later"
                raise ValueError(message)
            one = self._instructions[number]
            self._instructions[number] = Instruction(
                one.opcode, one.to, one.source, distance, one.value, one.words
            )
        notes = {number: tuple(lines) for number, lines in self._notes.items()}
        return Program(
            self.byteorder, tuple(self._instructions), dict(self._maps), notes
        )
