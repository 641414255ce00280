"""Tests that were made for shared memory, over RoCE: named ones, unchanged.

They run in a pytest of their own, in a process that was forked from this one and has
everything loaded. Both ends are in that process: what they are about is the transport.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.lab.measuring import show
from tests.lab.network_faults import resources, wait_for_resources

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = ("cacheprovider", "xdist", "pytest_cov", "randomly", "lab.host")
"""Plugins of the pytest that runs this one."""


class Collector:
    """Counts how tests went."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Let fewer clients come at once, where a module names a number."""
        for module in {item.getparent(pytest.Module).obj for item in items}:  # type: ignore[union-attr]
            if hasattr(module, "CLIENTS"):
                module.CLIENTS = CLIENTS

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the call of each test, and what failed around it."""
        if report.when == "call" or report.failed:
            self.outcomes[report.outcome] += 1


def play(where: list[str], fabric: str, host: str) -> tuple[Counter[str], str]:
    """Run tests over a fabric; gives how they went, and what pytest wrote."""
    with tempfile.NamedTemporaryFile("w+") as result, tempfile.TemporaryFile() as text:
        pid = os.fork()
        if pid == 0:
            os.dup2(text.fileno(), 1)
            os.dup2(text.fileno(), 2)
            try:
                outcomes = _be_pytest(where, fabric, host)
                Path(result.name).write_text(json.dumps(outcomes))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        text.seek(0)
        words = text.read().decode(errors="replace")
        return Counter(json.loads(result.read() or "{}")), words


def _be_pytest(where: list[str], fabric: str, host: str) -> dict[str, int]:
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # until the end
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.environ |= {
        "PYSMC_TEST_FABRIC": fabric,
        "PYSMC_TEST_HOST": host,
        "PYSMC_TWINS_LANES": "threads",
    }
    os.chdir(ROOT)
    collector = Collector()
    flags = [flag for name in WITHOUT for flag in ("-p", f"no:{name}")]
    plugins: list[Any] = [collector]
    pytest.main([*flags, "-q", "--tb=short", "--durations=5", *where], plugins)
    sys.stdout.flush()
    sys.stderr.flush()
    return dict(collector.outcomes)


TRANSPORT = [
    "test_transport.py::" + name
    for name in (
        "test_echo_of_random_sizes[smcr]",
        "test_half_close_of_the_client[smcr]",
        "test_eof_without_keep_open_closes[smcr]",
        "test_close_with_unread_data_resets_the_peer[smcr]",
        "test_abort_that_loses_bytes_is_a_reset",
        "test_slow_reader_stops_the_writer[smcr]",
        "test_pausing_while_data_comes[smcr]",
        "test_buffered_protocol[smcr]",
    )
]
TWINS = [
    "test_events.py::test_create_connection",
    "test_events.py::test_create_ssl_connection",
    "test_events.py::test_connect_accepted_socket",
    "test_sendfile.py::test_sendfile",
    "test_sendfile.py::test_sendfile_pre_and_post_data",
    "test_sendfile.py::test_sendfile_close_peer_after_receiving",
    "test_server.py::test_start_server_1",
    "test_sock_lowlevel.py::test_create_connection_sock",
    "test_ssl.py::test_flush_before_shutdown",
    "test_ssl.py::test_start_tls_client_reg_proto_1",
    "test_ssl.py::test_start_tls_server_1",
    "test_streams.py::test_open_connection",
    "test_streams.py::test_wait_closed_on_close_with_unread_data",
    "test_streams.py::test_drain_raises",
    "test_streams.py::test_eof_feed_when_closing_writer",
]
SUBSET = [
    *("tests/aio/" + name for name in TRANSPORT),
    # Two loops in two threads: each is a peer to the other.
    *(f"tests/twins/{name}[threads]" for name in TWINS),
]
REST = [
    "test_transport.py::test_a_buffer_may_be_reused_after_write[100000]",
    "test_transport.py::test_half_close_of_the_server_after_much_data[smcr]",
    "test_transport.py::test_close_sends_what_waits[smcr]",
    "test_transport.py::test_set_protocol_to_and_fro[smcr]",
    "test_transport.py::test_every_kind_of_buffer[smcr]",
    "test_transport.py::test_loop_sendfile[smcr]",
    "test_transport.py::test_many_small_writes_that_wait[smcr]",
    "test_transport_smcr.py::test_start_tls[smcr]",
]
"""What is not in every run; a start of pytest takes as long as they do."""


TLS = ["tests/twins/test_sslproto.py", "tests/twins/test_ssl.py"]
TLS_CASES = 30
OTHER_TWINS = [
    f"tests/twins/test_{name}.py"
    for name in ("events", "sendfile", "server", "sock_lowlevel", "streams")
]
OTHER_CASES = 44
AT_LOOPBACK = [
    "--deselect=tests/twins/" + name
    for name in (
        "test_events.py::test_create_server",  # and two that begin so
        "test_events.py::test_server_close",
        "test_sock_lowlevel.py::test_sock_accept",
    )
]
"""They connect to 127.0.0.1, wherever the lane is: there is no device on that way."""
CLIENTS = 5
"""Where a twin has 25 at once, with a TLS handshake and 2 MiB each: in an emulated
machine, whose one process is all of them and their server, no deadline would hold."""


def play_all(place, names: list[str], least: int = 0) -> None:
    """Run tests over the fabric of the place; all have to pass, and leave nothing.

    Args:
        place: Where.
        names: Tests, or modules of them.
        least: How many these are at least; by default as many as names.
    """
    before = resources()
    outcomes, words = play(names, place.fabric, place.server_host)
    show(words)
    assert set(outcomes) == {"passed"}, words
    assert outcomes["passed"] >= (least or len(names))
    wait_for_resources(before)


@pytest.mark.lab(seconds=150)
@pytest.mark.timeout(200)
def test_over_the_fabric(place) -> None:
    play_all(place, SUBSET)


@pytest.mark.lab_long(seconds=150)
@pytest.mark.timeout(200)
def test_the_rest_over_the_fabric(place) -> None:
    play_all(place, ["tests/aio/" + name for name in REST])


@pytest.mark.lab_long(seconds=240)
@pytest.mark.timeout(300)
def test_tls_over_the_fabric(place) -> None:
    """Every twin of asyncio's own tests of TLS."""
    play_all(place, TLS, TLS_CASES)


@pytest.mark.lab_long(seconds=200)
@pytest.mark.timeout(250)
def test_the_other_twins_over_the_fabric(place) -> None:
    play_all(place, OTHER_TWINS + AT_LOOPBACK, OTHER_CASES)
