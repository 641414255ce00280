"""What can go wrong between bytes and messages.

::

    ValueError
    ├─ DecodeError     the bytes are not a message
    └─ EncodeError     the message has no bytes

Decides nothing about guilt: whether a peer or a program of ours is to blame is
known to whoever called. Each error says which field, and where it lies.

Source: RFC 7609 appendix A (what the formats demand).
"""

from __future__ import annotations


class _FormatError(ValueError):
    """An error with a place: which field, at which byte of the message."""

    def __init__(self, message: str, *, field: str, offset: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        """What is wrong, with the number found and what was allowed."""
        self.field = field
        """Path of the field, such as ``v2.eids``; names as in the dataclasses."""
        self.offset = offset
        """Byte offset in the message, None when it has no fixed place."""

    def __reduce__(self) -> tuple[object, ...]:
        """Keep field and offset when copied or sent between processes."""
        return _restore, (type(self), self.message, self.field, self.offset)

    def __str__(self) -> str:
        place = "" if self.offset is None else f" at byte {self.offset}"
        return f"{self.message} (field {self.field}{place})"


def _restore(
    kind: type[_FormatError], message: str, field: str, offset: int | None
) -> _FormatError:
    """Make a copied error again from its parts."""
    return kind(message, field=field, offset=offset)


class DecodeError(_FormatError):
    """The bytes are not an SMC-R message; ``field`` and ``offset`` say where."""


class EncodeError(_FormatError):
    """The message cannot be put into bytes; ``field`` says what does not fit."""
