"""The checks of the kernel's own SMC; nothing here has a module loaded."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from pysmc.cli.checks import kernel_smc, kernel_smc_tables
from pysmc.cli.checks.check import examine
from pysmc.cli.checks.kernel_smc_tables import Pnetid, Tables, read_tables
from pysmc.cli.checks.machine import Machine
from pysmc.fabric.netlink_messages import build_attribute

ALIASES = "/lib/modules/6.12.41+deb12-amd64/modules.alias"
REGISTERED = {
    "/proc/net/protocols": "protocol  size sockets  memory\n"
    "INET_SMC  1832      0      -1\nSMC6  1832  0  -1\nSMC  1832  1  -1\n\n"
}
OTHERS = {"/proc/net/protocols": "protocol  size\nINET_SMC 1\nTCPv6 2\nTCP 3\n"}
LOADABLE = {ALIASES: "alias net-pf-4 ipx\nalias net-pf-43 smc\n"}
NOT_LOADABLE = {ALIASES: "alias net-pf-4 ipx\nalias net-pf-430 other\n"}


B_RXE1 = Pnetid("B", "rxe1:1")


class Kernel:
    """Says how its sockets fail, and notes which were asked for."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.asked: list[tuple[int, int]] = []

    def __call__(self, family: int, protocol: int) -> int:
        self.asked.append((family, protocol))
        return self.error


class TestSocket:
    @pytest.mark.parametrize(
        ("files", "words"),
        [
            (LOADABLE, "a module for it"),
            (LOADABLE | OTHERS, "a module for it"),
            (OTHERS, "cannot be seen here"),
            ({}, "cannot be seen here"),
        ],
    )
    def test_nothing_is_loaded(self, files, words, machine):
        kernel = Kernel()
        finding = kernel_smc.af_smc.look(machine(files, socket_error=kernel))
        assert (finding.status, kernel.asked) == ("skip", [])
        assert words in finding.seen
        assert "modprobe smc" in finding.remedy

    @pytest.mark.parametrize(
        ("files", "error", "status", "words"),
        [
            (REGISTERED, 0, "ok", "has AF_SMC"),
            (REGISTERED | LOADABLE, 0, "ok", "has AF_SMC"),
            (REGISTERED, errno.EPERM, "warn", "EPERM"),
            (REGISTERED, 4095, "warn", "4095"),
            (NOT_LOADABLE, errno.EAFNOSUPPORT, "skip", "has no AF_SMC"),
        ],
    )
    def test_it_is_asked_by_a_socket(self, files, error, status, words, machine):
        kernel = Kernel(error)
        finding = kernel_smc.af_smc.look(machine(files, socket_error=kernel))
        assert (finding.status, kernel.asked) == (status, [(43, 0)])
        assert words in finding.seen

    @pytest.mark.parametrize(
        ("error", "status", "words"),
        [
            (0, "ok", "has IPPROTO_SMC"),
            (errno.EPROTONOSUPPORT, "skip", "AF_SMC"),
            (errno.EACCES, "warn", "EACCES"),
        ],
    )
    def test_the_protocol(self, error, status, words, machine):
        kernel = Kernel(error)
        finding = kernel_smc.ipproto_smc.look(machine(socket_error=kernel))
        assert (finding.status, kernel.asked) == (status, [(socket.AF_INET, 256)])
        assert words in finding.seen

    def test_real_sockets(self):
        ask = Machine().socket_error
        assert ask(socket.AF_INET, 0) == 0
        assert ask(socket.AF_INET, socket.IPPROTO_UDP) == errno.EPROTONOSUPPORT


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("espintcp mptcp smc\n", "warn", "espintcp mptcp smc"),
        ("espintcp mptcp smcx\n", "ok", "without smc"),
        ("\n", "ok", "is ''"),
        (None, "ok", "cannot be read"),
    ],
)
def test_ulp(text, status, words, machine):
    files = {} if text is None else {kernel_smc.ULPS: text}
    (report,) = examine(machine(files), [kernel_smc.ulp])
    assert report.status == status
    assert words in report.seen
    assert bool(report.remedy) == (status == "warn")


def with_tables(machine, pnetids=None, ueids=None, **fields):
    return machine(smc_tables=lambda: Tables(pnetids, ueids), **fields)


class TestTables:
    @pytest.mark.parametrize(
        ("rows", "status", "words"),
        [
            (None, "skip", "no such table"),
            ([], "ok", "It is empty"),
            (
                [Pnetid("A", "va"), Pnetid("B", "vb"), Pnetid("A", "rxe0:1"), B_RXE1],
                "ok",
                "A: va, rxe0:1; B: vb, rxe1:1.",
            ),
            ([Pnetid("A", "va"), Pnetid("B", "rxe0:1")], "warn", "A: va; B: rxe0:1."),
        ],
    )
    def test_pnetids(self, rows, status, words, machine):
        finding = kernel_smc.pnetids.look(with_tables(machine, pnetids=rows))
        assert finding.status == status
        assert words in finding.seen

    @pytest.mark.parametrize(
        ("rows", "ours", "status", "words"),
        [
            (None, "A", "skip", "no such table."),
            ([], "A", "warn", "has none."),
            (["A", "B"], "", "ok", "A, B."),
            (["A", "B"], "B,C", "ok", "A, B; PYSMC_UEIDS has B."),
            (["A"], "C", "ok", "A; PYSMC_UEIDS has none of them."),
        ],
    )
    def test_ueids(self, rows, ours, status, words, machine):
        here = with_tables(machine, ueids=rows, environ={"PYSMC_UEIDS": ours})
        finding = kernel_smc.ueids.look(here)
        assert finding.status == status
        assert finding.seen.endswith(words)

    @pytest.mark.parametrize("item", [kernel_smc.pnetids, kernel_smc.ueids])
    def test_what_cannot_be_read(self, item, machine):
        def read() -> Tables:
            raise PermissionError(errno.EACCES, "Permission denied")

        finding = item.look(machine(smc_tables=read))
        assert finding.status == "skip"
        assert "Permission denied" in finding.seen


def text(kind: int, value: str) -> bytes:
    return build_attribute(kind, value.encode() + b"\0")


def row(*attributes: bytes) -> bytes:
    return bytes(4) + b"".join(attributes)


class Netlink:
    """A kernel whose families and tables are rows of bytes, by number of the family."""

    def __init__(self, protocol: int, rows: dict[int, list[bytes]]) -> None:
        assert protocol == 16
        self.rows = rows
        self.asked: list[tuple[int, int]] = []
        self.is_closed = False

    def ask(self, kind: int, flags: int, body: bytes):
        assert flags == 0x300
        self.asked.append((kind, body[0]))
        for answer in self.rows[kind]:
            yield kind, answer
        yield 3, b""  # of another kind: not looked at

    def close(self) -> None:
        self.is_closed = True


FAMILIES = [
    row(text(2, "nlctrl"), build_attribute(1, struct.pack("=H", 16))),
    row(text(2, "SMC_PNETID"), build_attribute(1, struct.pack("=H", 31))),
    row(text(2, "broken"), build_attribute(1, b"\1")),
    row(text(2, "SMC_GEN_NETLINK"), build_attribute(1, struct.pack("=H", 32))),
]


def read_from(monkeypatch, rows: dict[int, list[bytes]]) -> tuple[Tables, Netlink]:
    made: list[Netlink] = []

    def questions(protocol: int) -> Netlink:
        made.append(Netlink(protocol, rows))
        return made[-1]

    monkeypatch.setattr(kernel_smc_tables, "Questions", questions)
    tables = read_tables()
    assert made[0].is_closed
    return tables, made[0]


def test_the_tables_of_a_kernel(monkeypatch):
    pnetids = [
        row(text(1, "LAB"), text(2, "va"), text(3, "n/a"), build_attribute(4, b"\xff")),
        row(text(1, "LAB"), text(2, "n/a"), text(3, "rxe0"), build_attribute(4, b"\1")),
        row(text(1, "ODD\x07")),
    ]
    ueids = [row(text(1, "PROD.EAST".ljust(32))), row()]
    tables, asked = read_from(monkeypatch, {16: FAMILIES, 31: pnetids, 32: ueids})
    assert tables == Tables(
        [Pnetid("LAB", "va"), Pnetid("LAB", "rxe0:1"), Pnetid("ODD?", ":0")],
        ["PROD.EAST"],
    )
    # All families are listed: a question for one by name would load its module.
    assert asked.asked == [(16, 3), (31, 1), (32, 9)]


def test_a_kernel_without(monkeypatch):
    tables, asked = read_from(monkeypatch, {16: FAMILIES[:1]})
    assert tables == Tables(None, None)
    assert asked.asked == [(16, 3)]


def test_this_kernel():
    """Whatever it has: the answer is understood."""
    tables = Machine().smc_tables()
    assert tables.ueids is None or len(tables.ueids) <= 4
