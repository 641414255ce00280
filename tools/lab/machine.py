"""Starts QEMU with the guest, one at a time, and makes sure that it ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self

from lab import initramfs, kernel
from lab.errors import GuestDied
from lab.places import HERE, ROOT, cache

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY_MB = 3072
PROCESSORS = 2
BOOT_WAIT = 120.0
"""Seconds until the guest must be ready; 5 to 15 are usual without KVM."""
PROBE_WAIT = 10
"""Seconds for a kernel to say its first word with KVM."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a guest is started with."""

    accelerator: str
    """"kvm" or "tcg"."""
    kernel: kernel.Kernel
    archive: Path
    results: Path
    """The writable share."""
    memory_mb: int = MEMORY_MB
    is_shell: bool = False

    def command(self) -> list[str]:
        """Build the command line of QEMU."""
        share = "security_model=none,multidevs=remap"
        serial = ["-serial", f"file:{self.results / 'console.log'}"]
        if self.is_shell:
            # Ctrl-C is for what runs in the guest, not for QEMU.
            serial = ["-chardev", "stdio,id=terminal,signal=off"]
            serial += ["-serial", "chardev:terminal"]
        accelerator = "kvm" if self.accelerator == "kvm" else "tcg,thread=multi"
        return [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot",
            "-display", "none", "-monitor", "none", *serial,
            "-machine", "q35", "-accel", accelerator, "-cpu", "max",
            "-smp", str(PROCESSORS), "-m", str(self.memory_mb),
            "-kernel", str(self.kernel.image), "-initrd", str(self.archive),
            "-append", self.arguments(),
            "-device", "virtio-rng-pci",
            "-virtfs", f"local,path=/,mount_tag=host,readonly=on,{share}",
            "-virtfs", f"local,path={self.results},mount_tag=share,{share}",
        ]  # fmt: skip

    def arguments(self) -> str:
        """Build the kernel's command line; what it does not know, init gets."""
        words = ["console=ttyS0", "quiet", "loglevel=4", "panic=-1", "oops=panic"]
        words += ["nokaslr", "mitigations=off", "random.trust_cpu=on", "audit=0"]
        told = {
            "LAB_FOLDER": str(HERE),
            "LAB_KERNEL": str(self.kernel.folder),
            "LAB_TREE": str(ROOT),
            "LAB_HOME": str(Path.home()),
        }
        if self.is_shell:
            size = shutil.get_terminal_size((120, 40))
            told |= {"LAB_SHELL": "1", "LAB_ROWS": str(size.lines)}
            told["LAB_COLUMNS"] = str(size.columns)
        return " ".join([*words, *(f"{name}={value}" for name, value in told.items())])


def prepare(
    results: Path, *, is_shell: bool = False, series: str = kernel.USUAL
) -> Setup:
    """Get what a guest is started with, from the cache where it is there.

    Args:
        results: The writable share.
        is_shell: Give a shell in place of a job.
        series: Of the kernel, one of `kernel.SERIES`.

    Raises:
        LabMissing: No kernel can be had.
    """
    found = kernel.get(series)
    archive = initramfs.build(found)
    memory = int(os.environ.get("PYSMC_LAB_MEMORY_MB", MEMORY_MB))
    way = accelerator(found)
    return Setup(way, found, archive, results, memory, is_shell)


def accelerator(found: kernel.Kernel) -> str:
    """Tell whether KVM works here; tried once for a boot of the host."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    note = cache() / "accelerator"
    words = note.read_text(encoding="ascii").split() if note.exists() else []
    if len(words) != 2 or words[0] != boot:
        words = [boot, "kvm" if _kvm_works(found) else "tcg"]
        note.write_text(" ".join(words), encoding="ascii")
    return words[1]


def _kvm_works(found: kernel.Kernel) -> bool:
    """Boot without a root: a kernel that complains about that has come far enough."""
    command = ["timeout", "--kill-after=2", str(PROBE_WAIT), "qemu-system-x86_64"]
    command += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    command += ["-serial", "stdio", "-accel", "kvm", "-cpu", "max", "-m", "512"]
    command += ["-kernel", str(found.image), "-append", "console=ttyS0 panic=-1"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    return b"VFS: Unable to mount root" in done.stdout


@contextmanager
def only_one() -> Iterator[None]:
    """Hold the lock of the lab: a second guest would only make both slow.

    Waits as long as somebody else's guest runs, which has a limit of its own.
    """
    path = Path(os.environ.get("PYSMC_LAB_LOCK") or cache() / "lock")
    with path.open("a+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"lab: waiting for another guest's end ({path})", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Machine:
    """A guest that runs.

    Args:
        setup: What it is started with.
        limit: Seconds after which QEMU is ended whatever happens.
    """

    def __init__(self, setup: Setup, limit: float) -> None:
        self.setup = setup
        with (setup.results / "qemu.log").open("wb") as log:
            self._process = self._start(limit, log)

    def _start(self, limit: float, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """QEMU ends with us, with the time, and with the process that counts that."""
        setup = self.setup
        end_with_us = ["setpriv", "--pdeathsig"]
        return subprocess.Popen(
            [
                *end_with_us, "TERM", "timeout", "--foreground", "--kill-after=5",
                str(int(limit)), *end_with_us, "KILL", *setup.command(),
            ],
            stdin=None if setup.is_shell else subprocess.DEVNULL,
            stdout=None if setup.is_shell else subprocess.DEVNULL,
            stderr=log,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def is_running(self) -> bool:
        """Whether QEMU has not ended."""
        return self._process.poll() is None

    def wait(self, name: str, seconds: float) -> Path:
        """Wait until the guest has put a file into the share.

        Args:
            name: Of the file.
            seconds: How long.

        Raises:
            GuestDied: QEMU has ended, or the time is over.
        """
        path = self.setup.results / name
        end = time.monotonic() + seconds
        while not path.exists():
            if not self.is_running and not path.exists():
                text = "the guest has ended ({})"
                raise GuestDied(text, self.last_words())
            if time.monotonic() > end:
                text = "no word of the guest within {:g} s ({})"
                raise GuestDied(text, seconds, self.last_words())
            time.sleep(0.05)
        return path

    def join(self) -> int:
        """Wait until QEMU has ended by itself; gives its exit code."""
        return self._process.wait()

    def end(self) -> None:
        """End QEMU; the guest has nothing that could be lost."""
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def last_words(self, lines: int = 30) -> str:
        """Give the end of the console's log and what QEMU itself said."""
        parts = []
        for name in ("console.log", "qemu.log"):
            path = self.setup.results / name
            if path.exists() and path.stat().st_size:
                text = path.read_text(encoding="utf-8", errors="replace")
                parts.append(f"{name}:\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(parts) or "it said nothing"
