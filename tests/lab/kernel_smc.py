"""Linux's own SMC as a peer: set up, asked, and used by processes of its own.

A kernel end is a forked child with blocking sockets of IPPROTO_SMC. A connect() or an
accept() of the kernel may block for good, and so a child has a limit of its own, and is
killed when its scenario ends. It tells what it has to tell as JSON, one fact a line.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from tests.lab import smc_netlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from tests.lab.smc_netlink import Socket

__all__ = ["HOSTS", "IPPROTO_SMC", "UEID", "Kernel", "KernelEnd", "smc_socket"]

IPPROTO_SMC = 256
UEID = "PYSMC.LAB"
"""The one that both ends of the lab have."""
HOSTS = {"va": ("10.0.0.1", "LABONE"), "vb": ("10.0.0.2", "LABTWO")}
"""Network devices, their addresses and their PNETIDs."""
RDMA_DEVICES = {"va": "rxe0", "vb": "rxe1"}
LISTENING = 10
CHILD_SECONDS = 120
"""Seconds after which a kernel end is gone whatever it does."""
PATIENCE = 60.0
"""Seconds that a fact may take, unless a scenario says otherwise."""
STEP = 0.05
SYSCTLS = Path("/proc/sys/net/smc")
MODULE = Path("/sys/module/smc")


def smc_socket(timeout: float | None = PATIENCE) -> socket.socket:
    """Make a socket of the kernel's SMC, an IPv4 one.

    Before Linux 6.11 there is AF_SMC only, which Python does not know; but its
    addresses are those of AF_INET, and so the socket may say that it is one.

    Args:
        timeout: Seconds that each of its calls may take; None is for ever.
    """
    try:
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SMC)
    except OSError as error:
        if error.errno != errno.EPROTONOSUPPORT:
            raise
        number = socket.socket(smc_netlink.AF_SMC, socket.SOCK_STREAM, 0).detach()
        made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=number)
    made.settimeout(timeout)
    return made


def knows_protocol() -> bool:
    """Tell whether the kernel has IPPROTO_SMC, which older ones do not.

    Nor can they speak SMC-R with themselves over soft-RoCE: Linux 6.1 hangs.
    """
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SMC).close()
    except OSError:
        return False
    return True


@functools.cache
def load() -> None:
    """Load the modules; once is enough for a guest."""
    subprocess.run(["modprobe", "-a", "smc", "smc_diag"], check=True)


def set_up() -> None:
    """Make this kernel a host that speaks SMC-R over rxe0 and over rxe1."""
    load()
    smc_netlink.flush_pnetids()
    smc_netlink.flush_ueids()
    for device, (_, name) in HOSTS.items():
        smc_netlink.add_pnetid(name, device, RDMA_DEVICES[device])
    smc_netlink.add_ueid(UEID)


def warm_up() -> None:
    """Let two sockets of the kernel meet, once: the first first contact is slow.

    The link group that they leave says nothing for its ten minutes.
    """
    quiet = SYSCTLS / "smcr_testlink_time"
    before = quiet.read_text(encoding="utf-8")
    quiet.write_text("0", encoding="utf-8")
    try:
        with smc_socket() as listener, smc_socket() as client:
            listener.bind((HOSTS["va"][0], 0))
            listener.listen()
            client.bind((HOSTS["vb"][0], 0))
            client.connect(listener.getsockname())
            accepted, _ = listener.accept()
            with accepted:
                client.sendall(b"1")
                assert accepted.recv(1) == b"1"
    finally:
        quiet.write_text(before, encoding="utf-8")


@dataclass
class KernelEnd:
    """A process that uses the kernel's SMC."""

    name: str
    pid: int
    _facts: int
    _buffer: bytes = b""
    _code: int | None = None

    def fact(self, deadline: float = PATIENCE) -> dict[str, Any]:
        """Read the next thing that it tells; an exception of it is a failure."""
        end = time.monotonic() + deadline
        while b"\n" not in self._buffer:
            left = max(0.0, end - time.monotonic())
            if not select.select([self._facts], [], [], left)[0]:
                stack = Path(f"/proc/{self.pid}/stack").read_text(encoding="utf-8")
                message = (
                    f"{self.name} said nothing for {deadline} s; it is in\n{stack}"
                )
                raise AssertionError(message)
            data = os.read(self._facts, 1 << 16)
            if not data:
                message = f"{self.name} has ended with {self.wait()} and said nothing"
                raise AssertionError(message)
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        if "exception" in found:
            message = f"{self.name}: {found['exception']}"
            raise AssertionError(message)
        return found

    def _fail(self, what: str) -> NoReturn:
        """Say what it did not do, and where in the kernel it is."""
        stack = Path(f"/proc/{self.pid}/stack").read_text(encoding="utf-8")
        message = f"{self.name} {what}; it is in\n{stack}"
        raise AssertionError(message)

    def kill(self) -> None:
        """End it at once; the kernel closes its sockets."""
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, deadline: float = PATIENCE) -> int:
        """Wait for its end; gives its exit code, or minus its signal."""
        if self._code is None:
            handle = os.pidfd_open(self.pid)
            ended = select.select([handle], [], [], deadline)[0]
            os.close(handle)
            if not ended:
                self._fail("is still there")
            status = os.waitpid(self.pid, 0)[1]
            self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def clean_up(self) -> None:
        """End it, whatever it does."""
        self.kill()
        self.wait()
        os.close(self._facts)


@dataclass
class Kernel:
    """The kernel's SMC of this guest, and the ends that use it."""

    ends: list[KernelEnd] = field(default_factory=list)
    _sysctls: dict[str, str] = field(default_factory=dict)

    def start(self, name: str, work: Callable[..., None], *arguments: Any) -> KernelEnd:
        """Fork an end.

        Args:
            name: Shown in failures.
            work: What it does: takes a function that tells facts (a dictionary),
                and the arguments.
            arguments: For the work.
        """
        ours, theirs = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            _work(theirs, work, arguments)
        os.close(theirs)
        end = KernelEnd(name, pid, ours)
        self.ends.append(end)
        return end

    def sockets(
        self, port: int | None = None, peer_port: int | None = None
    ) -> list[Socket]:
        """List the SMC sockets that are not listening.

        Args:
            port: Only those that have this port themselves.
            peer_port: Only those whose peer has this one.
        """
        return [
            found
            for found in smc_netlink.smc_diag()
            if found.state != LISTENING
            and port in {None, found.port}
            and peer_port in {None, found.peer_port}
        ]

    def wait_for(
        self, is_so: Callable[[list[Socket]], Any], deadline: float = 10.0
    ) -> list[Socket]:
        """Ask until the answer is as wanted; gives it."""
        end = time.monotonic() + deadline
        while not is_so(found := self.sockets()):
            assert time.monotonic() < end, found
            select.select([], [], [], STEP)
        return found

    def wait_until_gone(self, deadline: float = 10.0) -> None:
        """Wait until the kernel has no SMC socket but listening ones."""
        self.wait_for(lambda found: not found, deadline)

    def sysctl(self, name: str, value: int) -> None:
        """Change a setting of net.smc until the scenario ends."""
        path = SYSCTLS / name
        self._sysctls.setdefault(name, path.read_text(encoding="utf-8"))
        path.write_text(str(value), encoding="utf-8")

    @contextmanager
    def no_ueid(self, *others: str) -> Iterator[None]:
        """Take its UEID away while the block lasts, and give it these."""
        smc_netlink.flush_ueids()
        for name in others:
            smc_netlink.add_ueid(name)
        try:
            yield
        finally:
            smc_netlink.flush_ueids()
            smc_netlink.add_ueid(UEID)

    def __enter__(self) -> Self:
        """Begin."""
        is_new = not MODULE.exists()
        set_up()
        if is_new and knows_protocol():
            warm_up()
            self.wait_until_gone()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End every process, and put the settings back."""
        for end in self.ends:
            end.clean_up()
        for name, value in self._sysctls.items():
            (SYSCTLS / name).write_text(value, encoding="utf-8")


def _work(facts: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Be the child."""
    signal.alarm(CHILD_SECONDS)

    def tell(**fact: Any) -> None:
        os.write(facts, json.dumps(fact).encode() + b"\n")

    code = 1
    try:
        work(tell, *arguments)
        code = 0
    except BaseException:  # noqa: BLE001  # told to the scenario
        tell(exception=traceback.format_exc())
    finally:
        os._exit(code)
