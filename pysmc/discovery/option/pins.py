"""Programs that are pinned in a BPF file system, for somebody else to attach.

Decides which file is which program. A service manager that attaches programs by their
path (systemd's ``BPFProgram=``) does so each time it starts the service; the programs
themselves stay loaded as long as the files are there.

Source: bpf(2) (BPF_OBJ_PIN), systemd.resource-control(5).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from pysmc.discovery.option.bpf import Bpf, BpfError
from pysmc.discovery.option.loading import PARTS, load
from pysmc.discovery.option.machine import this_machine

if TYPE_CHECKING:
    from pathlib import Path

    from pysmc.discovery.option.machine import Machine

__all__ = ["pin", "unpin"]

OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH


def pin(
    folder: Path, *, bpf: Bpf | None = None, machine: Machine | None = None
) -> bool:
    """Load the programs and pin them; nothing happens if the same are pinned.

    Programs that are attached already are not affected by newer ones in the files.

    Args:
        folder: In a mounted BPF file system; made if it is not there. Nobody but root
            and this process's user may be able to change it: what is attached from
            there runs for every socket of a service.
        bpf: The kernel.
        machine: What it runs on.

    Returns:
        Whether anything was pinned.

    Raises:
        BpfError: A step failed, for example because it is no BPF file system.
        OSError: The folder cannot be made, or an old file not removed. EPERM: others
            could put programs of theirs there.
    """
    bpf = bpf or Bpf()
    _check_owner(folder)
    with ExitStack() as stack:
        loaded = load(stack, bpf, machine or this_machine())
        if all(_tag(bpf, folder / one.part.name) == one.tag for one in loaded):
            return False
        # All three share one map of sockets, so it is all or nothing.
        unpin(folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        _check_owner(folder)  # somebody may have made it meanwhile
        try:
            for one in loaded:
                bpf.pin(str(folder / one.part.name), one.descriptor)
        except BpfError:
            unpin(folder)
            raise
    return True


def unpin(folder: Path) -> int:
    """Remove the files, and the folder if it is empty; what is attached stays so.

    Returns:
        How many files there were.

    Raises:
        OSError: One cannot be removed.
    """
    count = 0
    for part in PARTS:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (folder / part.name).unlink()
            count += 1
    # Somebody else may keep files there; otherwise nothing is left behind.
    with contextlib.suppress(OSError):
        folder.rmdir()
    return count


def _check_owner(folder: Path) -> None:
    try:
        found = folder.stat()
    except FileNotFoundError:
        return
    if found.st_uid not in {0, os.geteuid()} or found.st_mode & OTHERS_WRITE:
        message = "others could change the programs that are pinned in it"
        raise PermissionError(errno.EPERM, message, str(folder))


def _tag(bpf: Bpf, path: Path) -> str | None:
    try:
        number = bpf.open_pin(str(path))
    except BpfError:
        return None
    try:
        return bpf.program_info(number).tag
    finally:
        os.close(number)
