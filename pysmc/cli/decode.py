"""Print an SMC-R message from hex in words: every field, code and reason.

CLC, LLC and CDC messages and the TCP option are recognised by themselves.

Source: RFC 7609 appendix A; smcproto.decode does the reading.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

HELP = "print a CLC, LLC or CDC message from hex in words"

HEX_MOST = 2 * 65_536
"""Longest input in hex digits: no message is longer than 64 KiB."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--hex",
        required=True,
        metavar="BYTES",
        help='one whole message as hex digits (blanks and colons allowed), "-" reads'
        " standard input",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def command(options: argparse.Namespace) -> int:
    """Decode and print; 1 when the bytes are no message, 2 when they are no hex."""
    from smcproto.decode import decode, explain
    from smcproto.errors import DecodeError

    text = sys.stdin.read(HEX_MOST + 1) if options.hex == "-" else options.hex
    digits = "".join(text.split()).replace(":", "").removeprefix("0x")
    if len(digits) > HEX_MOST:
        print("pysmc decode: more than 65536 bytes", file=sys.stderr)
        return 2
    try:
        data = bytes.fromhex(digits)
    except ValueError:
        print("pysmc decode: --hex wants pairs of the digits 0-9, a-f", file=sys.stderr)
        return 2
    try:
        plane, message = decode(data)
    except DecodeError as error:
        if options.json:
            print(json.dumps({"plane": None, "error": str(error)}))
        else:
            print(f"no SMC-R message: {error}", file=sys.stderr)
        return 1
    lines = explain(message)
    name = type(message).__name__
    if options.json:
        rows = [
            {"field": line.field, "value": line.value, "words": line.words}
            for line in lines
        ]
        print(json.dumps({"plane": str(plane), "message": name, "fields": rows}))
        return 0
    print(f"{plane} {name}, {len(data)} bytes")
    field_width = max((len(line.field) for line in lines), default=0)
    value_width = min(40, max((len(line.value) for line in lines), default=0))
    for line in lines:
        row = (
            f"  {line.field:<{field_width}}  {line.value:<{value_width}}  {line.words}"
        )
        print(row.rstrip())
    return 0
