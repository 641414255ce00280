"""construct, tamed: the only module that knows that library's quirks.

Decides how a run of bytes becomes named values and back: exact sizes, reserved
bits ignored when read and zero when written, 24-bit integers, enumeration members
instead of strings, several fields in one byte. A layout is a construct ``Struct``;
what it gives out are plain dictionaries, never construct's ``Container``. Repeated
entries are read with ``struct``, because construct takes some ten microseconds for
each and a message may hold hundreds.

Knows no message of SMC-R.

Source: RFC 7609 A.2, "Reserved fields must be set to zero and not validated".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import construct

from smcproto.errors import DecodeError, EncodeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from enum import IntEnum, IntFlag

Buffer: TypeAlias = bytes | bytearray | memoryview
"""What a parser takes; the results never refer to it."""


@dataclass(frozen=True, slots=True)
class Field:
    """A named piece of a layout: one value, several in a byte, or none."""

    names: tuple[str, ...]
    """Names of the values; none for constants and reserved bytes."""
    subcon: Any
    """The construct object, named after the first value or unnamed."""
    nested: bool = False
    """Whether the construct object gives a dictionary of several values."""


@dataclass(frozen=True, slots=True)
class Bit:
    """One value inside a byte; bits that no member names are reserved."""

    name: str
    mask: int
    """Adjacent bits of the byte, 0x80 the most significant."""
    convert: Callable[[int], Any] = int
    """From the bits, shifted down, to the value: ``int``, ``bool`` or a lookup."""


_INTEGERS = {
    1: construct.Int8ub,
    2: construct.Int16ub,
    3: construct.Int24ub,
    4: construct.Int32ub,
    8: construct.Int64ub,
}


def member_or_int(codes: type[IntEnum]) -> Callable[[int], int]:
    """Give a lookup: the enumeration member, or the plain number if unknown."""
    known: dict[int, int] = {int(member): member for member in codes}

    def convert(value: int) -> int:
        return known.get(value, value)

    return convert


def uint(name: str, size_bytes: int) -> Field:
    """An unsigned big-endian integer of 1, 2, 3, 4 or 8 bytes."""
    return Field((name,), name / _INTEGERS[size_bytes])


def code(name: str, size_bytes: int, codes: type[IntEnum]) -> Field:
    """A code point: the enumeration member, or the plain number if unknown.

    construct's own ``Enum`` gives strings that are equal to no member.
    """
    convert = member_or_int(codes)
    subcon = construct.ExprAdapter(
        _INTEGERS[size_bytes],
        lambda value, _context: convert(value),
        lambda value, _context: value,
    )
    return Field((name,), name / subcon)


def flags(name: str, members: type[IntFlag]) -> Field:
    """A byte of flags; bits that the type does not define are reserved."""
    defined = 0
    for member in members:
        defined |= member

    def encode(value: int, _context: Any) -> int:
        if value & ~defined:
            raise _misfit(name, f"{value:#x} has undefined flags")
        return value

    subcon = construct.ExprAdapter(
        construct.Int8ub, lambda value, _context: members(value & defined), encode
    )
    return Field((name,), name / subcon)


def raw(name: str, size_bytes: int) -> Field:
    """Exactly that many bytes, given and taken as ``bytes``."""

    def encode(value: Any, _context: Any) -> bytes:
        # construct's Bytes would take an int as well, and so hide a mistake.
        if not isinstance(value, bytes):
            raise _misfit(name, f"{value!r} is not bytes")
        if len(value) != size_bytes:
            raise _misfit(name, f"{len(value)} bytes where {size_bytes} are needed")
        return value

    subcon = construct.ExprAdapter(
        construct.Bytes(size_bytes), lambda value, _context: value, encode
    )
    return Field((name,), name / subcon)


def text(name: str, size_bytes: int) -> Field:
    """Text, padded with blanks; the padding is not part of the value.

    Any byte is let through (as Latin-1), so that what a peer sends can be compared
    and echoed even if it is not the ASCII that it ought to be.
    """
    subcon = construct.ExprAdapter(
        construct.Bytes(size_bytes),
        lambda value, _context: decode_text(value),
        lambda value, _context: encode_text(value, size_bytes, name),
    )
    return Field((name,), name / subcon)


def words(name: str, count: int) -> Field:
    """A tuple of that many 32-bit integers."""
    codec = struct.Struct(f">{count}I")

    def encode(value: tuple[int, ...], _context: Any) -> bytes:
        try:
            return codec.pack(*value)
        except (struct.error, TypeError) as error:
            msg = f"{value!r} is not {count} numbers of 32 bits"
            raise EncodeError(msg, field=name) from error

    subcon = construct.ExprAdapter(
        construct.Bytes(codec.size),
        lambda value, _context: codec.unpack(value),
        encode,
    )
    return Field((name,), name / subcon)


def bits(*members: Bit) -> Field:
    """One byte that holds several values."""
    plan = tuple(
        (member.name, member.mask, (member.mask & -member.mask).bit_length() - 1)
        for member in members
    )
    decoders = tuple(
        (name, mask, shift, member.convert)
        for (name, mask, shift), member in zip(plan, members, strict=True)
    )

    def decode(byte: int, _context: Any) -> dict[str, Any]:
        return {
            name: convert((byte & mask) >> shift)
            for name, mask, shift, convert in decoders
        }

    def encode(values: Mapping[str, Any], _context: Any) -> int:
        byte = 0
        for name, mask, shift in plan:
            value = values[name]
            limit = mask >> shift
            if not (isinstance(value, int) and 0 <= value <= limit):
                raise _misfit(name, f"{value!r} is outside 0 to {limit}")
            byte |= value << shift
        return byte

    names = tuple(member.name for member in members)
    subcon = construct.ExprAdapter(construct.Int8ub, decode, encode)
    return Field(names, names[0] / subcon, nested=True)


def constant(name: str, value: bytes) -> Field:
    """Bytes that are always the same; anything else is refused when read."""
    return Field((), name / construct.Const(value))


def reserved(size_bytes: int) -> Field:
    """Bytes that are ignored when read and zero when written."""
    return Field((), construct.Padding(size_bytes))


def _misfit(name: str, problem: str) -> EncodeError:
    """Say that a value has no place in its field."""
    return EncodeError(f"{name}: {problem}", field=name)


def decode_text(padded: bytes) -> str:
    """Take the blanks off a padded text."""
    return padded.rstrip(b" ").decode("latin-1")


def encode_text(value: str, size_bytes: int, field: str) -> bytes:
    """Pad a text with blanks.

    Raises:
        EncodeError: It is too long, not Latin-1, or ends in a blank, which the
            reader would take for padding.
    """
    try:
        encoded = value.encode("latin-1")
    except UnicodeEncodeError as error:
        msg = f"{value!r} is not ASCII"
        raise EncodeError(msg, field=field) from error
    if len(encoded) > size_bytes:
        raise _misfit(field, f"{value!r} exceeds {size_bytes} bytes")
    if encoded.endswith(b" "):
        raise _misfit(field, f"{value!r} ends in a blank")
    return encoded.ljust(size_bytes, b" ")


class Layout:
    """A run of bytes of fixed size.

    The caller checks that enough bytes are there; a layout never reads beyond its
    size and never accepts a value under a name that it does not have.
    """

    def __init__(self, name: str, *fields: Field, start: int = 0) -> None:
        """Put fields one behind the other.

        Args:
            name: What it is called in errors.
            fields: In the order of the wire.
            start: Offset in the message, for errors.
        """
        self.name = name
        self._struct = construct.Struct(*(field.subcon for field in fields))
        self._fields = tuple(
            (field.subcon.name, field.names, field.nested)
            for field in fields
            if field.names
        )
        self.names = frozenset(name for field in fields for name in field.names)
        """Names of all values."""
        self.size: int = self._struct.sizeof()
        """Bytes, exactly."""
        self._offsets: dict[str, int] = {}
        position = start
        for field in fields:
            for key in (*field.names, field.subcon.name or ""):
                self._offsets[key] = position
            position += field.subcon.sizeof()

    def parse(self, data: bytes, offset: int = 0) -> dict[str, Any]:
        """Read the values.

        Args:
            data: The whole message.
            offset: Where the layout starts in it; the caller has checked that all
                of it is there.

        Raises:
            DecodeError: A constant is not what it has to be.
        """
        assert len(data) - offset >= self.size, "the caller checks the length"
        try:
            container = self._struct.parse(data[offset : offset + self.size])
        except construct.ConstructError as error:
            field = _field_of(error)
            msg = f"{self.name}: {field} has an unexpected value"
            raise DecodeError(
                msg,
                field=field,
                offset=self._offsets.get(field),
            ) from error
        values: dict[str, Any] = {}
        for key, _names, nested in self._fields:
            if nested:
                values.update(container[key])
            else:
                values[key] = container[key]
        return values

    def build_from(self, source: object, **others: Any) -> bytes:
        """Write the values, taken from the attributes of the same names.

        Args:
            source: Usually a message.
            others: Values that are no attributes of it.

        Raises:
            EncodeError: A value does not fit; the field and its place are named.
        """
        own = {name: getattr(source, name) for name in self.names - others.keys()}
        return self.build(own | others)

    def build(self, values: Mapping[str, Any]) -> bytes:
        """Write the values.

        Raises:
            EncodeError: A value does not fit; the field and its place are named.
        """
        assert values.keys() == self.names, self.names ^ values.keys()
        tree = {
            key: {name: values[name] for name in names} if nested else values[key]
            for key, names, nested in self._fields
        }
        try:
            built = self._struct.build(tree)
        except construct.ConstructError as error:
            field = _field_of(error)
            msg = f"{self.name}: {values[field]!r} does not fit into {field}"
            raise EncodeError(
                msg,
                field=field,
                offset=self._offsets[field],
            ) from error
        except EncodeError as error:
            msg = f"{self.name}: {error.message}"
            raise EncodeError(
                msg,
                field=error.field,
                offset=self._offsets[error.field],
            ) from error
        return bytes(built)


def _field_of(error: construct.ConstructError) -> str:
    """Name the field that construct complains of: its path ends in it."""
    return str(error.path).rpartition(" -> ")[2]


class Rows:
    """Entries of fixed size, one behind the other, read and written at once."""

    def __init__(self, name: str, row_format: str) -> None:
        """Describe one entry.

        Args:
            name: The field that holds them, for errors.
            row_format: Big-endian ``struct`` codes, one for each column; ``16s``
                takes exactly 16 bytes.
        """
        self.name = name
        self._codec = struct.Struct(">" + row_format)
        self._widths = tuple(
            len(value) if isinstance(value, bytes) else 0
            for value in self._codec.unpack(bytes(self._codec.size))
        )
        self.size = self._codec.size
        """Bytes of one entry."""

    def parse(self, data: bytes, offset: int, count: int) -> Iterator[tuple[Any, ...]]:
        """Read that many entries; the caller has checked that they are there."""
        assert len(data) - offset >= count * self.size, "the caller checks the length"
        return self._codec.iter_unpack(data[offset : offset + count * self.size])

    def build(self, rows: Iterable[tuple[Any, ...]]) -> bytes:
        """Write all entries.

        Raises:
            EncodeError: A value does not fit into its column.
        """
        return b"".join(self._build_row(row) for row in rows)

    def _build_row(self, row: tuple[Any, ...]) -> bytes:
        for value, width in zip(row, self._widths, strict=True):
            # struct would pad or cut bytes of another length without a word.
            if width and len(value) != width:
                msg = f"{len(value)} bytes where {width} are needed"
                raise EncodeError(msg, field=self.name)
        try:
            return self._codec.pack(*row)
        except struct.error as error:
            msg = f"{row!r} does not fit"
            raise EncodeError(msg, field=self.name) from error
