"""construct, tamed: the only module that knows that library's quirks.

Decides how a run of bytes becomes named values and back: exact sizes, reserved
bits ignored when read and zero when written, 24-bit integers, enumeration members
instead of strings, several values in one byte. A layout is a construct ``Struct``
of plain integers and bytes, one element for each run of the figure in the RFC; what
an element means is decided here, and what a layout gives out are dictionaries,
never construct's ``Container``. Because construct takes some microseconds for each
element, what it was told is also put into one ``struct`` code, which reads and writes
whatever is as it should be; anything else goes to construct, which says what is wrong.

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
    """One element of a layout: a value, several in a byte, or none."""

    subcon: Any
    """The construct object; it has a name unless the bytes are reserved."""
    names: tuple[str, ...] = ()
    """Names of the values; none for constants and reserved bytes."""
    decode: Callable[[Any], tuple[Any, ...]] | None = None
    """From what construct read to one value for each name; None: it is the value."""
    encode: Callable[..., Any] | None = None
    """From one value for each name to what construct writes; None: it is that."""
    code: str = ""
    """The ``struct`` code that reads and writes the same."""
    read: Callable[[Any], Any] | None = None
    """From what ``struct`` read to what construct would have; None: it is that."""
    write: Callable[[Any], Any] | None = None
    """From what construct would write to what ``struct`` takes; None: it is that."""
    fixed: bytes = b""
    """Of a constant: what it is."""


@dataclass(frozen=True, slots=True)
class Bit:
    """One value inside a byte; bits that no member names are reserved."""

    name: str
    mask: int
    """Adjacent bits of the byte, 0x80 the most significant."""
    convert: Callable[[int], Any] = int
    """From the bits, shifted down, to the value: ``int``, ``bool`` or a lookup."""

    @property
    def shift(self) -> int:
        """How far the bits are from the right."""
        return (self.mask & -self.mask).bit_length() - 1


_INTEGERS = {
    1: construct.Int8ub,
    2: construct.Int16ub,
    3: construct.Int24ub,
    4: construct.Int32ub,
    8: construct.Int64ub,
}
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


def member_or_int(codes: type[IntEnum]) -> Callable[[int], int]:
    """Give a lookup: the enumeration member, or the plain number if unknown."""
    known: dict[int, int] = {int(member): member for member in codes}

    def convert(value: int) -> int:
        return known.get(value, value)

    return convert


def uint(name: str, size_bytes: int) -> Field:
    """An unsigned big-endian integer of 1, 2, 3, 4 or 8 bytes."""
    subcon = name / _INTEGERS[size_bytes]
    if size_bytes == 3:  # struct has no code for it
        return Field(subcon, (name,), None, None, "3s", _read_24, _write_24)
    return Field(subcon, (name,), code=_CODES[size_bytes])


def _read_24(packed: bytes) -> int:
    return int.from_bytes(packed, "big")


def _write_24(value: Any) -> bytes:
    if type(value) is not int:
        raise TypeError  # let construct have a look at it
    return value.to_bytes(3, "big")


def code(name: str, size_bytes: int, codes: type[IntEnum]) -> Field:
    """A code point: the enumeration member, or the plain number if unknown.

    construct's own ``Enum`` gives strings that are equal to no member.
    """
    convert = member_or_int(codes)
    return Field(
        name / _INTEGERS[size_bytes],
        (name,),
        lambda number: (convert(number),),
        code=_CODES[size_bytes],
    )


def flags(name: str, members: type[IntFlag]) -> Field:
    """A byte of flags; bits that the type does not define are reserved."""
    defined = 0
    for member in members:
        defined |= member

    def encode(value: int) -> int:
        if value & ~defined:
            raise _misfit(name, f"{value:#x} has undefined flags")
        return value

    return Field(
        name / construct.Int8ub,
        (name,),
        lambda byte: (members(byte & defined),),
        encode,
        "B",
    )


def raw(name: str, size_bytes: int) -> Field:
    """Exactly that many bytes, given and taken as ``bytes``."""

    def encode(value: object) -> bytes:
        # construct's Bytes would take an int as well, and so hide a mistake.
        if not isinstance(value, bytes):
            raise _misfit(name, f"{value!r} is not bytes")
        if len(value) != size_bytes:
            raise _misfit(name, f"{len(value)} bytes where {size_bytes} are needed")
        return value

    subcon = name / construct.Bytes(size_bytes)
    return Field(subcon, (name,), encode=encode, code=f"{size_bytes}s")


def text(name: str, size_bytes: int) -> Field:
    """Text, padded with blanks; the padding is not part of the value.

    Any byte is let through (as Latin-1), so that what a peer sends can be compared
    and echoed even if it is not the ASCII that it ought to be.
    """
    return Field(
        name / construct.Bytes(size_bytes),
        (name,),
        lambda padded: (decode_text(padded),),
        lambda value: encode_text(value, size_bytes, name),
        f"{size_bytes}s",
    )


def words(name: str, count: int) -> Field:
    """A tuple of that many 32-bit integers."""
    codec = struct.Struct(f">{count}I")

    def encode(value: tuple[int, ...]) -> bytes:
        try:
            return codec.pack(*value)
        except (struct.error, TypeError) as error:
            msg = f"{value!r} is not {count} numbers of 32 bits"
            raise EncodeError(msg, field=name) from error

    return Field(
        name / construct.Bytes(codec.size),
        (name,),
        lambda packed: (codec.unpack(packed),),
        encode,
        f"{codec.size}s",
    )


def bits(*members: Bit) -> Field:
    """One byte that holds several values."""
    plan = tuple((bit.mask, bit.shift, bit.convert) for bit in members)

    def decode(byte: int) -> tuple[Any, ...]:
        return tuple([convert((byte & mask) >> shift) for mask, shift, convert in plan])

    def encode(*values: Any) -> int:
        byte = 0
        for bit, value in zip(members, values, strict=True):
            limit = bit.mask >> bit.shift
            if not (isinstance(value, int) and 0 <= value <= limit):
                raise _misfit(bit.name, f"{value!r} is outside 0 to {limit}")
            byte |= value << bit.shift
        return byte

    names = tuple(bit.name for bit in members)
    return Field(names[0] / construct.Int8ub, names, decode, encode, "B")


def constant(name: str, value: bytes) -> Field:
    """Bytes that are always the same; anything else is refused when read."""
    subcon = name / construct.Const(value)
    return Field(subcon, code=f"{len(value)}s", fixed=value)


def reserved(size_bytes: int) -> Field:
    """Bytes that are ignored when read and zero when written."""
    return Field(construct.Padding(size_bytes), code=f"{size_bytes}x")


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
        self._fields = tuple(field for field in fields if field.names)
        self.names = frozenset(name for field in fields for name in field.names)
        """Names of all values."""
        self.size: int = self._struct.sizeof()
        """Bytes, exactly."""
        self._codec = struct.Struct(">" + "".join(field.code for field in fields))
        assert self._codec.size == self.size, "struct and construct read the same"
        told = [field for field in fields if field.names or field.fixed]
        self._plan = tuple(
            (field.names, field.fixed, field.read, field.decode) for field in told
        )
        self._plan_back = tuple(
            (field.names, field.fixed, field.encode, field.write) for field in told
        )
        self._offsets: dict[str, int] = {}
        position = start
        for field in fields:
            for key in field.names or (field.subcon.name,):
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
        values: dict[str, Any] = {}
        elements = self._codec.unpack_from(data, offset)
        # zip without strict, which costs: both lengths are the layout's.
        for (names, fixed, read, decode), element in zip(self._plan, elements):  # noqa: B905
            if fixed:
                if element != fixed:
                    return self.parse_by_construct(data, offset)
                continue
            value = element if read is None else read(element)
            if decode is None:
                values[names[0]] = value
            elif len(names) == 1:
                (values[names[0]],) = decode(value)
            else:
                values.update(zip(names, decode(value)))  # noqa: B905
        return values

    def parse_by_construct(self, data: bytes, offset: int = 0) -> dict[str, Any]:
        """Read the values as construct does; see `parse`, which gives the same.

        Raises:
            DecodeError: A constant is not what it has to be.
        """
        try:
            container = self._struct.parse(data[offset : offset + self.size])
        except construct.ConstructError as error:
            field = _field_of(error)
            msg = f"{self.name}: {field} has an unexpected value"
            raise DecodeError(
                msg, field=field, offset=self._offsets.get(field)
            ) from error
        values: dict[str, Any] = {}
        for each in self._fields:
            value, names = container[each.subcon.name], each.names
            decoded = (value,) if each.decode is None else each.decode(value)
            values.update(zip(names, decoded, strict=True))
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
        elements: list[Any] = []
        try:
            for names, fixed, encode, write in self._plan_back:
                if fixed:
                    elements.append(fixed)
                    continue
                if encode is None:
                    element = values[names[0]]
                else:
                    element = encode(*[values[name] for name in names])
                elements.append(element if write is None else write(element))
            return self._codec.pack(*elements)
        except (EncodeError, struct.error, TypeError, OverflowError):
            return self.build_by_construct(values)

    def build_by_construct(self, values: Mapping[str, Any]) -> bytes:
        """Write the values as construct does; see `build`, which gives the same.

        Raises:
            EncodeError: A value does not fit; the field and its place are named.
        """
        tree = {}
        try:
            for each in self._fields:
                own = [values[name] for name in each.names]
                value = own[0] if each.encode is None else each.encode(*own)
                tree[each.subcon.name] = value
            built = self._struct.build(tree)
        except EncodeError as error:
            field, problem, cause = error.field, error.message, error
        except construct.ConstructError as error:
            field = _field_of(error)
            problem, cause = f"{field}: {values[field]!r} does not fit", error
        else:
            return bytes(built)
        msg = f"{self.name}: {problem}"
        raise EncodeError(msg, field=field, offset=self._offsets[field]) from cause


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
            (column, len(value))
            for column, value in enumerate(self._codec.unpack(bytes(self._codec.size)))
            if isinstance(value, bytes)
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
        entries = tuple(rows)
        for column, width in self._widths:
            for entry in entries:
                # struct would pad or cut bytes of another length without a word.
                if len(entry[column]) != width:
                    msg = f"{len(entry[column])} bytes where {width} are needed"
                    raise EncodeError(msg, field=self.name)
        try:
            return b"".join([self._codec.pack(*entry) for entry in entries])
        except struct.error as error:
            msg = f"{self.name}: an entry does not fit ({error})"
            raise EncodeError(msg, field=self.name) from error
