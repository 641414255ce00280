"""The checks of discovery: for real here, and what each says when it fails."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple

import pytest

from pysmc.cli.checks import discovery
from pysmc.cli.checks.check import examine
from pysmc.cli.checks.machine import Machine
from pysmc.discovery.option.cgroup import NoCgroupError
from pysmc.discovery.option.trial import Trial
from pysmc.info import ConnectionInfo
from pysmc.reasons import reason

COOKIES = discovery.SYNCOOKIES
HERE = Machine()
CAN_LOCAL = HERE.number(COOKIES) != 2 and os.geteuid() != 65534


@pytest.mark.skipif(not CAN_LOCAL, reason="needs tcp_syncookies=1, and a user's id")
@pytest.mark.parametrize(
    "item", [discovery.mark, discovery.connection], ids=lambda item: item.name
)
def test_here_it_works_and_leaves_nothing_open(item):
    item.look(HERE)  # loads what it needs
    before = os.listdir("/proc/self/fd")
    finding = item.look(HERE)
    assert (finding.status, finding.means, finding.remedy) == ("ok", "", "")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_the_connection_says_what_it_is():
    finding = discovery.connection.look(HERE)
    assert finding.seen == "A connection of this host is SMC-R 2.1 over shm."


@pytest.mark.parametrize(
    ("files", "status"),
    [
        ({COOKIES: "0\n"}, "ok"),
        ({COOKIES: "1\n"}, "ok"),
        ({COOKIES: "2\n"}, "fail"),
        ({}, "ok"),
    ],
)
def test_cookies(files, status, machine):
    assert discovery.cookies.look(machine(files)).status == status


def test_a_mark_that_does_not_arrive(machine, monkeypatch):
    monkeypatch.setattr("pysmc.discovery.mark.set_mark", lambda sock, ipv4: None)
    finding = discovery.mark.look(machine())
    assert finding.status == "fail"
    assert finding.seen == "The mark did not arrive over IPv4."


def test_a_kernel_that_keeps_no_syn(machine, monkeypatch):
    def save_syn(listener):
        raise OSError(92, "Protocol not available")

    monkeypatch.setattr("pysmc.discovery.mark.save_syn", save_syn)
    finding = discovery.mark.look(machine())
    assert finding.status == "fail"
    assert "Protocol not available" in finding.seen


def test_without_ipv6(machine, monkeypatch):
    real = discovery._mark_arrives

    def arrives(family, host):
        if family == socket.AF_INET6:
            raise OSError(99, "Cannot assign requested address")
        return real(family, host)

    monkeypatch.setattr(discovery, "_mark_arrives", arrives)
    finding = discovery.mark.look(machine())
    assert finding.status == "ok"
    assert "IPv6 is not there (Cannot assign requested address)" in finding.seen


def test_a_connection_that_stays_tcp_says_why(machine, monkeypatch):
    why = reason("NO_MEMORY", "peer")
    info = ConnectionInfo(mode="tcp", role="client", reason=why)
    monkeypatch.setattr(discovery, "_connect", lambda: info)
    finding = discovery.connection.look(machine())
    assert finding.status == "fail"
    assert str(why) in finding.seen


def test_a_connection_that_fails(machine, monkeypatch):
    def connect():
        raise TimeoutError

    monkeypatch.setattr(discovery, "_connect", connect)
    finding = discovery.connection.look(machine())
    assert finding.status == "fail"
    assert "TimeoutError" in finding.seen


@pytest.mark.parametrize(
    ("environ", "status", "words"),
    [
        ({}, "skip", "does not have 'static'"),
        ({"PYSMC_DISCOVERY": "static"}, "warn", "is empty"),
        (
            {"PYSMC_DISCOVERY": "static", "PYSMC_PEERS": "10.0.0.2,[fd00::2]:80"},
            "ok",
            "Listed: 10.0.0.2, [fd00::2]:80.",
        ),
        (
            {"PYSMC_DISCOVERY": "local,static", "PYSMC_PEERS": "db.example.org"},
            "fail",
            "peers contains 'db.example.org'",
        ),
    ],
)
def test_static(environ, status, words, machine):
    finding = discovery.static_peers.look(machine(environ=environ))
    assert finding.status == status
    assert words in finding.seen


NOT_THERE = Trial(None, works=False, reason="No programs are installed for this.")
BROKEN = Trial(1, works=False, reason="The set-up is incomplete.")
WORKS = Trial(1, works=True, reason="")
OVER_VERBS = {"PYSMC_FABRICS": "verbs"}


@pytest.mark.parametrize(
    ("trial", "cgroups", "environ", "status", "seen"),
    [
        (WORKS, ["/c"], {}, "ok", "this process; the programs are attached to /c."),
        (WORKS, [], {}, "ok", "It works for sockets of this process."),
        (NOT_THERE, [], {}, "skip", "No programs are installed for this."),
        (NOT_THERE, [], {"PYSMC_DISCOVERY": "local"} | OVER_VERBS, "skip", "No pro"),
        (NOT_THERE, ["/a", "/b"], {}, "skip", "They are attached to /a, /b."),
        (NOT_THERE, [], OVER_VERBS, "warn", "No programs are installed for this."),
        (BROKEN, ["/c"], {}, "fail", "The set-up is incomplete. They are attached to"),
    ],
)
def test_tcp_option(trial, cgroups, environ, status, seen, machine):
    here = machine(
        environ=environ, try_option=lambda: trial, option_cgroups=lambda: cgroups
    )
    (report,) = examine(here, [discovery.tcp_option])
    assert report.status == status
    assert seen in report.seen
    assert ("pysmc option attach" in report.remedy) == (status != "ok")


def test_the_option_of_this_machine(monkeypatch):
    """Whatever it is; where nobody may look for cgroups, none is named."""
    assert discovery.tcp_option.look(HERE).seen
    monkeypatch.setattr("pysmc.discovery.option.install.mount_point", no_cgroup)
    assert HERE.option_cgroups() == []


def no_cgroup():
    raise NoCgroupError("no cgroup2")


def test_cgroups_that_have_the_option(monkeypatch):
    class Found(NamedTuple):
        cgroup: str

    rows = [Found("/b"), Found("/a"), Found("/b")]
    monkeypatch.setattr("pysmc.discovery.option.install.find_all", lambda: rows)
    assert HERE.option_cgroups() == ["/a", "/b"]
