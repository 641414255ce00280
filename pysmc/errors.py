"""Every exception that pysmc raises, sorted by guilt.

::

    SmcError
    ├─ ProtocolError            abstract: .section, .diagnosis
    │   ├─ LocalProtocolError   you asked for what this state forbids
    │   └─ RemoteProtocolError  the peer broke the protocol
    ├─ Declined                 fallback="require": .reason
    ├─ HandshakeTimeout         a CLC answer never came (TimeoutError)
    ├─ FabricError              .operation, .status
    │   └─ FabricUnavailable    no device: says what is missing
    ├─ ForkedError              an object of the parent used in the child
    ├─ ConnectionReset          peer or link ended it (ConnectionResetError)
    ├─ PeerClosed               we wrote after the peer's end (BrokenPipeError)
    └─ ConnectionAborted        we ended it (ConnectionAbortedError)

The ones that reach an application also derive from the standard library's
``ConnectionError`` family or ``TimeoutError``, so that ``except`` clauses written for
TCP keep working. This module knows no bytes, sockets or fabrics.

Source: RFC 7609 sections 3.5.1.6 (Decline) and 4.8.2 (abnormal termination).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from pysmc.reasons import Reason

__all__ = [
    "ConnectionAborted",
    "ConnectionReset",
    "Declined",
    "FabricError",
    "FabricUnavailable",
    "ForkedError",
    "HandshakeTimeout",
    "LocalProtocolError",
    "PeerClosed",
    "ProtocolError",
    "RemoteProtocolError",
    "SmcError",
]


class SmcError(Exception):
    """Base of everything that pysmc raises on purpose."""


class ProtocolError(SmcError):
    """A rule of the protocol was broken; use one of the two subclasses.

    Attributes:
        section: Where the rule stands, for example ``"RFC 7609 section 4.7"``.
        diagnosis: The Decline code to answer with, 0 when no Decline is possible.
    """

    def __init__(self, message: str, *, section: str = "", diagnosis: int = 0) -> None:
        if type(self) is ProtocolError:
            abstract = "raise LocalProtocolError or RemoteProtocolError instead"
            raise TypeError(abstract)
        super().__init__(message)
        self.section = section
        self.diagnosis = diagnosis

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        return f"{text} ({self.section})" if self.section else text


class LocalProtocolError(ProtocolError):
    """The caller asked for something that this state forbids."""


class RemoteProtocolError(ProtocolError):
    """The peer did something that the protocol forbids."""


class Declined(SmcError, ConnectionError):
    """SMC-R was required and could not be had; no application byte was sent.

    Attributes:
        reason: The same `Reason` that a fallen-back connection would show.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(f"SMC-R is required but not possible: {reason}")
        self.reason = reason


class HandshakeTimeout(SmcError, TimeoutError):
    """The peer said that it speaks SMC and then did not answer in time.

    This is never a fallback: a late answer would be read as application data.
    """


class FabricError(SmcError, ConnectionError):
    """An operation of a fabric failed.

    Attributes:
        operation: What was tried, for example ``"register memory"``.
        status: Name of the completion status or errno, for example ``"ENOMEM"``.
    """

    def __init__(self, operation: str, status: str, detail: str = "") -> None:
        super().__init__(f"{operation}: {status}" + (f" ({detail})" if detail else ""))
        self.operation = operation
        self.status = status
        self.detail = detail


class FabricUnavailable(FabricError):
    """No device of this fabric can be used here; the text says what is missing."""


class ForkedError(SmcError, RuntimeError):
    """An object that belongs to the parent process was used after ``fork()``."""


class _Ended(SmcError):
    """What the errors that end a connection have in common.

    Args:
        message: What happened.
        fabric: Name of the fabric that carried it, None when it is not known.
        diagnosis: A code of the protocol that explains it, 0 when there is none.
    """

    _number: ClassVar[int]

    def __init__(
        self, message: str, *, fabric: str | None = None, diagnosis: int = 0
    ) -> None:
        super().__init__(message)
        self.errno: int | None = self._number
        self.fabric = fabric
        self.diagnosis = diagnosis


class ConnectionReset(_Ended, ConnectionResetError):
    """The peer, or the link to it, ended the connection.

    Attributes:
        errno: ECONNRESET, as TCP says it.
        fabric: Name of the fabric that carried it, None when it is not known.
        diagnosis: A code of the protocol that explains it, 0 when there is none.
    """

    _number = errno.ECONNRESET


class PeerClosed(_Ended, BrokenPipeError):
    """The peer had finished, and it is gone: what was written reaches nobody.

    Attributes:
        errno: EPIPE, as TCP says it.
        fabric: Name of the fabric that carried it, None when it is not known.
        diagnosis: A code of the protocol that explains it, 0 when there is none.
    """

    _number = errno.EPIPE


class ConnectionAborted(_Ended, ConnectionAbortedError):
    """This side ended the connection because of an error.

    Attributes:
        errno: ECONNABORTED, as TCP says it.
        fabric: Name of the fabric that carried it, None when it is not known.
        diagnosis: A code of the protocol that explains it, 0 when there is none.
    """

    _number = errno.ECONNABORTED
