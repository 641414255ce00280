"""smcproto: what SMC-R's bytes mean.

Messages are frozen dataclasses with ``parse`` and ``build``. ``clc.parse``,
``llc.parse`` and ``cdc.unpack`` read any message of a plane, ``decode.decode`` finds
out the plane by itself, and ``decode.explain`` says a message in words. Arbitrary
bytes give a message or ``DecodeError``, nothing else. There is no behaviour here:
``pysmc.core`` has that.

Source: RFC 7609 appendix A; Linux net/smc for versions 2.0 and 2.1.
"""

from __future__ import annotations

from smcproto import (
    cdc,
    clc,
    constants,
    decode,
    diagnosis,
    errors,
    llc,
    tcp_option,
)
from smcproto.diagnosis import PeerDiagnosis, describe
from smcproto.errors import DecodeError, EncodeError

__all__ = [
    "DecodeError",
    "EncodeError",
    "PeerDiagnosis",
    "cdc",
    "clc",
    "constants",
    "decode",
    "describe",
    "diagnosis",
    "errors",
    "llc",
    "tcp_option",
]
