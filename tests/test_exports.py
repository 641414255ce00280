"""The public surface: the names that users rely on, and no others by accident."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import subprocess
import sys

import pytest

import pysmc
from pysmc import errors, reasons

# Names may be added; none of these may go or change its meaning.
PROMISED = {
    "Config",
    "ConnectionInfo",
    "Declined",
    "Loop",
    "Reason",
    "new_event_loop",
    "open_connection",
    "run",
    "start_server",
}

CONNECTION_INFO = {
    "mode", "version", "fabric", "role", "reason", "link_group", "links", "eid",
    "local_gid", "peer_gid", "rmbe_bytes", "peer_rmbe_bytes",
}  # fmt: skip

CONFIG = {
    "fabrics", "discovery", "peers", "fallback", "ueids", "rmbe_bytes", "sndbuf_bytes",
    "max_links", "max_connections", "allowed_uids", "rdma_device", "busy_poll_us",
}  # fmt: skip

REASONS = {
    "NOT_MARKED", "DISABLED", "SETUP_MISSING", "PEER_NO_SMC", "MARK_LOST", "NO_DEVICE",
    "NO_COMMON_EID", "FOREIGN_USER", "MODE", "VERSION", "RELEASE", "SUBNET", "VLAN",
    "ROUTE", "NO_MEMORY", "MEMLOCK", "LIMIT", "IPSEC", "LINK_FAILED", "OUT_OF_SYNC",
    "PEER_DECLINED", "INTERNAL",
}  # fmt: skip


def field_names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def test_promised_names_are_exported() -> None:
    assert set(pysmc.__all__) >= PROMISED


def test_every_exported_name_exists() -> None:
    assert [name for name in pysmc.__all__ if not hasattr(pysmc, name)] == []
    assert set(pysmc.__all__) <= set(dir(pysmc))


def test_all_errors_are_exported() -> None:
    assert set(pysmc.__all__) >= set(errors.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = pysmc.no_such_name


def test_run_has_the_signature_of_the_docs() -> None:
    parameters = inspect.signature(pysmc.run).parameters
    assert list(parameters) == ["main", "config", "debug"]
    assert parameters["config"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["debug"].kind is inspect.Parameter.KEYWORD_ONLY


def test_the_loop_factory_needs_no_argument() -> None:
    loop = pysmc.new_event_loop()
    try:
        assert isinstance(loop, pysmc.Loop)
        assert isinstance(loop, asyncio.SelectorEventLoop)
    finally:
        loop.close()


def test_connection_info_has_the_promised_fields() -> None:
    assert field_names(pysmc.ConnectionInfo) >= CONNECTION_INFO


def test_config_has_the_promised_fields() -> None:
    assert field_names(pysmc.Config) >= CONFIG


def test_reason_has_the_promised_fields() -> None:
    assert field_names(pysmc.Reason) >= {"code", "name", "side", "text"}


def test_every_reason_of_the_design_has_a_row() -> None:
    assert set(reasons.REASONS) == REASONS


@pytest.mark.parametrize("name", ["Config", "ConnectionInfo", "Reason"])
def test_records_are_frozen(name: str) -> None:
    cls = getattr(pysmc, name)
    assert dataclasses.is_dataclass(cls)
    assert getattr(cls, "__dataclass_params__").frozen  # noqa: B009 - not typed


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pysmc", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert pysmc.__version__ in done.stdout
