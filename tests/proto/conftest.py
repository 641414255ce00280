"""The protocol as data, for the tests of smcproto: vectors, layouts, flows."""

from __future__ import annotations

import json
import sys
import tomllib
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from smcproto import cdc, clc, llc, tcp_option

if TYPE_CHECKING:
    from collections.abc import Iterator

PROTO = Path(__file__).resolve().parents[2] / "proto"
PLANES = ("clc", "llc", "cdc", "tcp_option")
PARSERS = {
    "clc": clc.parse,
    "llc": llc.parse,
    "cdc": cdc.CdcMessage.parse,
    "tcp_option": tcp_option.SmcOption.parse,
}


FLOW_FILES = {
    "flow_file": "*.toml",
    "data_flow_file": "4.7.*.toml",
    "close_flow_file": "4.8.*.toml",
}


@cache
def load_json(name: str) -> Any:
    return json.loads((PROTO / "vectors" / f"{name}.json").read_text("utf-8"))


@cache
def load_toml(name: str) -> Any:
    return tomllib.loads((PROTO / name).read_text("utf-8"))


def valid_vectors() -> list[dict[str, Any]]:
    return [
        {"plane": plane, **vector}
        for plane in PLANES
        for vector in load_json(plane)["vectors"]
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that asks for a vector or a table once for each there is."""
    if "vector" in metafunc.fixturenames:
        rows = valid_vectors()
        metafunc.parametrize("vector", rows, ids=[row["id"] for row in rows])
    if "invalid_vector" in metafunc.fixturenames:
        rows = load_json("invalid")["vectors"]
        metafunc.parametrize("invalid_vector", rows, ids=[row["id"] for row in rows])
    for name, pattern in FLOW_FILES.items():
        if name in metafunc.fixturenames:
            paths = sorted((PROTO / "flows").glob(pattern))
            metafunc.parametrize(name, paths, ids=[path.stem for path in paths])


def flatten(part: object, prefix: str = "") -> dict[str, Any]:
    """Map paths to plain values: bytes as hexadecimal text, no absent parts."""
    flat: dict[str, Any] = {}
    names = (
        [field.name for field in fields(part)]
        if is_dataclass(part)
        else list(part._fields)  # type: ignore[attr-defined]
    )
    for name in names:
        value = getattr(part, name)
        if value is None:
            continue
        entries = (
            {f"{prefix}{name}[{number}]": entry for number, entry in enumerate(value)}
            if isinstance(value, tuple) and not hasattr(value, "_fields")
            else {f"{prefix}{name}": value}
        )
        for path, entry in entries.items():
            if is_dataclass(entry) or hasattr(entry, "_fields"):
                flat |= flatten(entry, f"{path}.")
            else:
                flat[path] = entry.hex() if isinstance(entry, bytes) else entry
    return flat


def default_of(message: object, path: str) -> Any:
    """Give the default of a message's own field, as ``flatten`` would show it."""
    name, _, index = path.rstrip("]").partition("[")
    defaults = {field.name: field.default for field in fields(message)}  # type: ignore[arg-type]
    default = defaults[name]
    assert default is not MISSING, f"{path} has no default"
    if index:
        default = default[int(index)]
    return default.hex() if isinstance(default, bytes) else default


@contextmanager
def untraced() -> Iterator[None]:
    """Switch tracing off: for measuring time, and for loops that repeat themselves."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


class ProtoData:
    """What tests ask for by the fixture ``proto``."""

    folder = PROTO
    parsers = PARSERS
    flatten = staticmethod(flatten)
    default_of = staticmethod(default_of)
    load_toml = staticmethod(load_toml)
    untraced = staticmethod(untraced)
    valid = staticmethod(valid_vectors)

    @staticmethod
    def load_invalid() -> list[dict[str, Any]]:
        """Give all invalid vectors."""
        rows: list[dict[str, Any]] = load_json("invalid")["vectors"]
        return rows

    @staticmethod
    def hex_of(identifier: str) -> bytes:
        """Give the bytes of a valid vector."""
        for vector in valid_vectors():
            if vector["id"] == identifier:
                return bytes.fromhex(vector["hex"])
        raise KeyError(identifier)


@pytest.fixture(scope="session")
def proto() -> ProtoData:
    return ProtoData()
