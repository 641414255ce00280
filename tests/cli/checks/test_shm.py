"""The checks of shared memory: for real here, and what each says when it fails."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from pysmc.cli.checks import shm
from pysmc.cli.checks.machine import Machine
from pysmc.errors import FabricUnavailable


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def refused(*args, **kwargs):
    raise PermissionError(errno.EPERM, "Operation not permitted")


IS_OVERFLOW = os.geteuid() == 65534


@pytest.mark.parametrize("item", shm.CHECKS, ids=lambda item: item.name)
@pytest.mark.skipif(IS_OVERFLOW, reason="run as any user but the overflow user")
def test_here_it_works_and_leaves_nothing_open(item):
    item.look(Machine())  # loads what it needs
    before = descriptors()
    finding = item.look(Machine())
    assert (finding.status, finding.means, finding.remedy) == ("ok", "", "")
    assert descriptors() == before


@pytest.mark.parametrize("call", ["memfd_create", "eventfd"])
def test_without_the_calls_of_memory(call, machine, monkeypatch):
    monkeypatch.setattr(os, call, refused)
    finding = shm.memory.look(machine())
    assert finding.status == "fail"
    assert "Operation not permitted" in finding.seen


def test_without_unix_sockets(machine, monkeypatch):
    monkeypatch.setattr(socket, "socket", refused)
    finding = shm.sockets.look(machine())
    assert finding.status == "fail"
    assert "Operation not permitted" in finding.seen


def test_a_descriptor_that_does_not_arrive(machine, monkeypatch):
    monkeypatch.setattr(socket, "recv_fds", lambda *args: (b"x", [], 0, None))
    finding = shm.sockets.look(machine())
    assert finding.status == "fail"
    assert "without its descriptor" in finding.seen


def test_another_user_at_the_other_end(machine):
    finding = shm.sockets.look(machine(euid=os.geteuid() + 1))
    assert finding.status == "fail"
    assert f"names user {os.geteuid()} " in finding.seen


@pytest.mark.parametrize(
    ("euid", "overflow", "status"),
    [
        (1000, "65534", "ok"),
        (65534, "65534", "fail"),
        (65534, None, "fail"),
        (65534, "99", "ok"),
        (0, "0", "fail"),
    ],
)
def test_the_overflow_user(euid, overflow, status, machine):
    files = {"/proc/sys/kernel/overflowuid": overflow} if overflow else {}
    finding = shm.user.look(machine(files, euid=euid))
    assert finding.status == status
    assert f"user {euid}" in finding.seen


def test_allowed_users_are_named(machine):
    finding = shm.user.look(machine(environ={"PYSMC_ALLOWED_UIDS": "1001,1002"}))
    assert "user 1000, and of 1001, 1002." in finding.seen


def test_what_names_the_host(machine):
    files = {shm.BOOT_ID: "0123456789-abc\n"}
    assert shm.BOOT_ID in shm.host.look(machine()).seen
    finding = shm.host.look(machine(files))
    assert finding.status == "fail"
    assert finding.seen.startswith(shm.NETWORK)
    finding = shm.host.look(machine({shm.NETWORK: ""}))
    assert finding.status == "ok"
    assert finding.seen.startswith("Boot 01234567, network namespace ")


def test_a_fabric_that_does_not_open(machine, monkeypatch):
    def unavailable(*args):
        raise FabricUnavailable("open the shm device", "UNAVAILABLE", "no /proc")

    monkeypatch.setattr("pysmc.fabric.shm.ShmDevice", unavailable)
    finding = shm.shm_exchange.look(machine())
    assert finding.status == "fail"
    assert "no /proc" in finding.seen
