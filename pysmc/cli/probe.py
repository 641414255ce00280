"""Ask a peer whether it speaks SMC: the option, and its answer to a Proposal.

Connects with the SMC option, offers what this machine can, says what came back at each
step, and leaves the peer in order: a Decline, then the end of the connection.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from pysmc.cli.probe_peer import Finding
    from pysmc.config import Config

HELP = "ask a peer whether it speaks SMC, and what it answers"

SECONDS = 6.0
"""As long as a kernel waits for a CLC message."""
SECONDS_MOST = 600.0
OPTION_WORDS = {
    True: "the SYN-ACK carried it: the peer says that it speaks SMC",
    False: "the SYN-ACK did not carry it",
    None: "not known",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "peer",
        metavar="HOST:PORT",
        help="a name or an address, and the port of the service; [IPv6]:PORT",
    )
    parser.add_argument(
        "--ueid",
        action="append",
        default=[],
        metavar="NAME",
        help="also offer this UEID (may be given again; by default PYSMC_UEIDS)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=SECONDS,
        metavar="SECONDS",
        help="longest wait for the connection, and then for the answer (default: 6)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def command(options: argparse.Namespace) -> int:
    """Ask and print; 0 when the peer answers by CLC, 1 when not, 2 for a mistake."""
    from pysmc.cli.probe_peer import probe

    try:
        host, port = _split(options.peer)
        config = _configuration(options.ueid)
        if not (math.isfinite(options.timeout) and 0 < options.timeout <= SECONDS_MOST):
            message = f"--timeout wants a number of seconds up to {SECONDS_MOST:g}"
            raise ValueError(message)  # noqa: TRY301  # all mistakes end alike
    except ValueError as error:
        print(f"pysmc probe: {error}", file=sys.stderr)
        return 2
    found = probe(host, port, config, options.timeout)
    if options.json:
        print(json.dumps(as_json(found)))
    else:
        print("\n".join(render(found)))
    return 0 if found.speaks_smc else 1


def _split(text: str) -> tuple[str, int]:
    """Take HOST:PORT apart.

    Raises:
        ValueError: It is something else.
    """
    message = f"{text!r} is not HOST:PORT (with an IPv6 address [ADDRESS]:PORT)"
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(message) from None
    extra = parts.path or parts.query or parts.fragment or "@" in text
    if not host or not port or extra or any(c.isspace() for c in text):
        raise ValueError(message)
    return host, port


def _configuration(ueids: list[str]) -> Config:
    """Read the settings of the environment, with more UEIDs.

    Raises:
        ValueError: A value is not allowed.
    """
    from pysmc.config import Config
    from pysmc.discovery.static import StaticPeers

    config = Config.from_env()
    StaticPeers(config.peers)
    return replace(config, ueids=tuple(dict.fromkeys((*ueids, *config.ueids))))


# What was found


def as_json(found: Finding) -> dict[str, Any]:
    """Give the object of ``--json``; what was not reached is null."""
    from smcproto.decode import explain

    offer, answer = found.offer, found.answer
    offered = None
    if offer is not None and offer.proposal.v2 is not None:
        v2 = offer.proposal.v2
        offered = {
            "eids": list(v2.eids),
            "gid": _gid(v2.gid),
            "device": offer.device or None,
            "release": v2.release,
            "peer_id": offer.proposal.peer_id.hex(),
            "note": offer.note,
        }
    fields = [
        {"field": line.field, "value": line.value, "words": line.words}
        for line in (explain(answer) if answer is not None else ())
    ]
    return {
        "host": found.host,
        "port": found.port,
        "address": found.address or None,
        "local_address": found.local_address or None,
        "tcp_option": found.tcp_option,
        "clc": found.clc,
        "version": found.version,
        "first_contact": found.first_contact,
        "eid": found.eid,
        "reason": found.reason or None,
        "detail": found.detail,
        "advice": found.advice,
        "listed": found.is_listed,
        "offered": offered,
        "answer": fields,
        "connect_ms": _rounded(found.connect_ms),
        "answer_ms": _rounded(found.answer_ms),
        "ms": _rounded(found.ms),
    }


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 2)


def _gid(gid: bytes) -> str:
    from ipaddress import IPv6Address

    address = IPv6Address(gid)
    return str(address.ipv4_mapped or address)


def render(found: Finding) -> Iterator[str]:
    """Make the lines for people: each step, then the verdict."""
    from smcproto.decode import explain

    if found.connect_ms is not None:
        yield (
            f"TCP      {found.local_address} to {found.address} port {found.port},"
            f" {found.connect_ms:.2f} ms"
        )
        listed = "; PYSMC_PEERS lists the peer" if found.is_listed else ""
        yield f"option   {OPTION_WORDS[found.tcp_option]}{listed}"
    if found.offer is not None and found.offer.proposal.v2 is not None:
        v2 = found.offer.proposal.v2
        device = f" of {found.offer.device}" if found.offer.device else ""
        yield (
            f"offered  SMC-R 2.{v2.release}, EIDs {', '.join(v2.eids) or 'none'},"
            f" GID {_gid(v2.gid)}{device}"
        )
        if found.offer.note:
            yield f"         {found.offer.note}"
    if found.answer is not None and found.answer_ms is not None:
        lines = explain(found.answer)
        yield f"answer   {lines[0].value} after {found.answer_ms:.2f} ms"
        field_width = max(len(line.field) for line in lines)
        value_width = min(40, max(len(line.value) for line in lines))
        for line in lines[1:]:
            row = f"  {line.field:<{field_width}}  {line.value:<{value_width}}"
            yield f"         {row}  {line.words}".rstrip()
    yield f"result   {verdict(found)}"
    if found.detail:
        yield f"         {found.detail}"
    if found.advice:
        yield f"         -> {found.advice}"


def verdict(found: Finding) -> str:
    """Say the answer to the question in one sentence."""
    where = f"{found.host} port {found.port}"
    if found.clc == "accept":
        version = f" {found.version}" if found.version else ""
        eid = f", EID {found.eid}" if found.eid else ""
        return f"{where} speaks SMC{version} and accepts{eid}."
    if found.clc == "decline":
        return f"{where} speaks SMC, but declines ({found.reason})."
    if found.connect_ms is None:
        return f"{where} cannot be asked ({found.reason})."
    if found.tcp_option is None and found.offer is None:
        return f"Whether {where} speaks SMC is not known ({found.reason})."
    if found.tcp_option:
        return f"{where} shows the SMC option, but no answer of SMC ({found.reason})."
    return f"{where} does not speak SMC ({found.reason})."
