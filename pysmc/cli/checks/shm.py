"""Checks of the shared-memory fabric, each by doing for real what the fabric does.

Decides whether two processes of this host could share memory: the calls that the fabric
is made of one by one, then the fabric itself.

Source: memfd_create(2), unix(7), user_namespaces(7); pysmc.fabric.shm.
"""

from __future__ import annotations

import array
import contextlib
import os
import secrets
import socket
from typing import TYPE_CHECKING

from pysmc.cli.checks.check import check, fail, ok
from pysmc.cli.checks.exchange import ExchangeFailed, exchange
from pysmc.errors import FabricError

if TYPE_CHECKING:
    from pysmc.cli.checks.check import Finding
    from pysmc.cli.checks.machine import Machine

__all__ = ["CHECKS"]

OVERFLOW_UID = 65534
"""The kernel's default, where /proc does not tell."""
ARENA_BYTES = 1024 * 1024
DEADLINE = 3.0
"""Seconds for each thing that is waited for."""
BOOT_ID = "/proc/sys/kernel/random/boot_id"
NETWORK = "/proc/self/ns/net"


@check(
    "shm.memory",
    looks_at="A sealed memfd of 1 MiB that is mapped, written and read; an eventfd.",
    means="Memory cannot be shared, so that connections of this host stay TCP.",
    remedy="Allow memfd_create, eventfd2 and mmap in the seccomp profile or sandbox;"
    " see that memory is left.",
)
def memory(machine: Machine) -> Finding:
    """Make memory as the fabric makes it."""
    del machine
    from pysmc.fabric.shm_arena import Arena

    arena = None
    try:
        arena = Arena(ARENA_BYTES)
        arena.memory[:2] = b"ok"
        os.close(os.eventfd(0, os.EFD_CLOEXEC))
    except OSError as error:
        return fail(f"It could not be had: {error}.")
    finally:
        if arena is not None:
            arena.close()
    return ok("A sealed memfd can be mapped and written, and an eventfd be had.")


@check(
    "shm.sockets",
    looks_at="A descriptor that is passed over an abstract Unix socket (SCM_RIGHTS),"
    " and the user that the kernel names at its other end (SO_PEERCRED).",
    means="Two processes cannot hand each other their memory.",
    remedy="Allow Unix sockets, sendmsg and recvmsg in the seccomp profile or sandbox"
    " (systemd: RestrictAddressFamilies must have AF_UNIX).",
)
def sockets(machine: Machine) -> Finding:
    """Pass a descriptor as the fabric does."""
    try:
        uid = _pass_a_descriptor()
    except OSError as error:
        return fail(f"It could not be passed: {error}.")
    if uid != machine.euid:
        return fail(f"The kernel names user {uid} at the other end, not ours.")
    return ok("A descriptor was passed over an abstract Unix socket.")


def _pass_a_descriptor() -> int:
    kind = socket.SOCK_SEQPACKET
    from pysmc.fabric.shm_endpoint import peer_uid

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        caller = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        for sock in (listener, caller):
            sock.settimeout(DEADLINE)
        listener.bind(f"\0pysmc/doctor/{secrets.token_hex(8)}")
        listener.listen(1)
        caller.connect(listener.getsockname())
        called = stack.enter_context(listener.accept()[0])
        called.settimeout(DEADLINE)
        rights = array.array("i", [listener.fileno()])
        caller.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        _, descriptors, _, _ = socket.recv_fds(called, 1, 1)
        for descriptor in descriptors:
            os.close(descriptor)
        if len(descriptors) != 1:
            message = "the message came without its descriptor"
            raise OSError(message)
        return peer_uid(caller)


@check(
    "shm.user",
    looks_at="Whether our user can be told from others: it must not be the overflow"
    " user, which stands for everybody of another user namespace.",
    means="The kernel shows this number for every user that it cannot name, so that it"
    " proves nothing: over shared memory, and by the discovery 'local', each peer"
    " refuses it (FOREIGN_USER).",
    remedy="Run the service as a user of its own instead of nobody (systemd: User= or"
    " DynamicUser=yes).",
)
def user(machine: Machine) -> Finding:
    """Look at who we are."""
    overflow = machine.number("/proc/sys/kernel/overflowuid")
    if machine.euid == (OVERFLOW_UID if overflow is None else overflow):
        return fail(f"This is user {machine.euid}, the overflow user.")
    others = machine.config.allowed_uids
    also = f", and of {', '.join(map(str, others))}" if others else ""
    return ok(f"Peers have to be processes of user {machine.euid}{also}.")


@check(
    "shm.host",
    looks_at="The boot id and the network namespace, of which the EID is made by which"
    " two ends find that they are on one host.",
    means="The fabric cannot tell where it is, and is not opened.",
    remedy="Mount /proc.",
)
def host(machine: Machine) -> Finding:
    """Look for what names this host."""
    boot_id = machine.text(BOOT_ID)
    if not boot_id:
        return fail(f"{BOOT_ID} cannot be read.")
    try:
        namespace = machine.path(NETWORK).stat().st_ino
    except OSError as error:
        return fail(f"{NETWORK}: {error.strerror}.")
    return ok(f"Boot {boot_id[:8]}, network namespace {namespace}.")


@check(
    "shm.exchange",
    looks_at="Two devices of the fabric in this process: connected, one write, one"
    " update.",
    means="The calls work one by one, but the fabric does not.",
    remedy="Report it, with the output of pysmc doctor --json.",
    needs=("kernel", "shm.memory", "shm.sockets", "shm.user", "shm.host"),
)
def shm_exchange(machine: Machine) -> Finding:
    """Have two devices exchange a write."""
    del machine
    from pysmc.fabric.shm import ShmDevice

    peer_ids = os.urandom(8), os.urandom(8)
    devices: list[ShmDevice] = []
    try:
        devices.append(ShmDevice(peer_ids[0]))
        devices.append(ShmDevice(peer_ids[1]))
        exchange((devices[0], devices[1]), peer_ids, DEADLINE)
    except (ExchangeFailed, FabricError) as error:
        return fail(f"{error}.")
    finally:
        for device in devices:
            device.close()
    return ok("Two devices of this process exchanged a write.")


CHECKS = (memory, sockets, user, host, shm_exchange)
