"""Putting the programs into a cgroup, looking for them, taking them away.

Decides in which order they are attached, what counts as being there, and leaves nothing
half done. The cgroup holds the programs: they outlive this process and go with the
cgroup, or at a reboot. CAP_BPF and CAP_NET_ADMIN are enough to attach. The names of
programs, by which ours are known, are shown only to CAP_SYS_ADMIN; for everybody
else `attach` leaves a note at the cgroup, an extended attribute.

Source: bpf(2), capabilities(7), xattr(7); kernel counterpart: kernel/bpf/cgroup.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pysmc.discovery.option.bpf import AttachType, Bpf, BpfError, Command
from pysmc.discovery.option.cgroup import mount_point
from pysmc.discovery.option.loading import PARTS, load, part_of
from pysmc.discovery.option.machine import this_machine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pysmc.discovery.option.loading import Loaded, Part
    from pysmc.discovery.option.machine import Machine

__all__ = [
    "Attached", "Foreign", "Found", "attach", "detach", "find", "find_all",
]  # fmt: skip

END: Final = (
    AttachType.CGROUP_SETSOCKOPT,
    AttachType.CGROUP_SOCK_OPS,
    AttachType.CGROUP_GETSOCKOPT,
)
"""Order of taking away: whoever was shown the option is still known of then."""
NOTE: Final = "user.pysmc.option"
"""Extended attribute of a cgroup: part, id and tag of each program, a line each."""


@dataclass(frozen=True, slots=True)
class Found:
    """A program of ours at a cgroup."""

    cgroup: Path
    part: Part
    id: int
    """The kernel's number of it, unique until a reboot."""
    abi: int
    """The version of its name."""
    tag: str
    """16 digits: the kernel's hash of the instructions."""
    descriptor: int | None = None
    """It is open, while what found it says so."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A sock_ops program of somebody else, which runs for the same sockets."""

    id: int
    name: str
    """Empty where it cannot be seen."""

    def __str__(self) -> str:
        return f"{self.name or 'without a name'} (id {self.id})"


@dataclass(frozen=True, slots=True)
class Attached:
    """What `attach` did."""

    cgroup: Path
    is_new: bool
    """False when the very same programs were there already."""
    replaced: int
    """Programs of an older or incomplete set-up that were taken away for it."""
    foreign: tuple[Foreign, ...]
    """What else runs for the sockets of this cgroup."""


def attach(
    cgroup: Path | None = None,
    *,
    bpf: Bpf | None = None,
    machine: Machine | None = None,
) -> Attached:
    """Attach the programs to a cgroup; nothing happens if they are there.

    Args:
        cgroup: Its directory; the root of all cgroups, the whole machine, by default.
        bpf: The kernel.
        machine: What it runs on.

    Raises:
        BpfError: A step failed; what was there before is there still.
        NoCgroupError: There is no cgroup2.
        OSError: The directory cannot be opened.
    """
    bpf = bpf or Bpf()
    where = cgroup or mount_point()
    with ExitStack() as stack:
        place = _open_directory(stack, where)
        loaded = load(stack, bpf, machine or this_machine())
        old = list(_ours(bpf, where, place, stack))
        wanted = sorted((one.part.name, one.tag) for one in loaded)
        is_new = sorted((one.part.name, one.tag) for one in old) != wanted
        if is_new:
            for one in old:
                _must_be_open(one)
            _attach_all(bpf, place, loaded)
            for one in _first_to_go(old):
                _detach(bpf, place, one)
            _leave_note(bpf, where, loaded)
        # Without a note they cannot be told from others by their names.
        ours = {bpf.program_info(one.descriptor).id for one in loaded}
        foreign = tuple(_foreign(bpf, where, place, stack, ours))
        return Attached(where, is_new, len(old) if is_new else 0, foreign)


def detach(cgroup: Path | None = None, *, bpf: Bpf | None = None) -> int:
    """Take all programs of ours away from a cgroup.

    Sockets that are open cannot be asked any more, as if there had been no programs.

    Returns:
        How many there were.

    Raises:
        BpfError: A step failed.
        NoCgroupError: There is no cgroup2.
        OSError: The directory cannot be opened.
    """
    bpf = bpf or Bpf()
    where = cgroup or mount_point()
    with ExitStack() as stack:
        place = _open_directory(stack, where)
        found = list(_ours(bpf, where, place, stack))
        for one in _first_to_go(found):
            _detach(bpf, place, one)
        with contextlib.suppress(OSError):
            os.removexattr(where, NOTE)
        return len(found)


def find(cgroup: Path, *, bpf: Bpf | None = None) -> tuple[Found, ...]:
    """List our programs at a cgroup, without those of its parents.

    Raises:
        BpfError: It cannot be asked; that needs CAP_NET_ADMIN.
        OSError: The directory cannot be opened.
    """
    bpf = bpf or Bpf()
    with ExitStack() as stack:
        place = _open_directory(stack, cgroup)
        return tuple(_ours(bpf, cgroup, place, stack))


def find_all(*, bpf: Bpf | None = None, top: Path | None = None) -> tuple[Found, ...]:
    """List our programs at all cgroups that can be seen.

    Args:
        bpf: The kernel.
        top: Where to begin; the root of all cgroups by default.

    Raises:
        BpfError: They cannot be asked; that needs CAP_NET_ADMIN.
        NoCgroupError: There is no cgroup2.
    """
    bpf = bpf or Bpf()
    found: list[Found] = []
    for folder, folders, _ in os.walk(top or mount_point()):
        folders.sort()
        try:
            found += find(Path(folder), bpf=bpf)
        except (FileNotFoundError, NotADirectoryError):
            continue  # gone since it was listed
    return tuple(found)


def _open_directory(stack: ExitStack, path: Path) -> int:
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, number)
    return number


def _attach_all(bpf: Bpf, place: int, loaded: Iterable[Loaded]) -> None:
    """Attach all or none."""
    done: list[Loaded] = []
    try:
        for one in loaded:
            bpf.attach(place, one.descriptor, one.part.place)
            done.append(one)
    except BpfError:
        for one in reversed(done):
            with contextlib.suppress(BpfError):
                bpf.detach(place, one.descriptor, one.part.place)
        raise


def _must_be_open(one: Found) -> int:
    if one.descriptor is None:
        step = f"take program {one.id} away from the cgroup"
        raise BpfError(errno.EPERM, step, Command.PROG_GET_FD_BY_ID)
    return one.descriptor


def _first_to_go(found: list[Found]) -> list[Found]:
    return sorted(found, key=lambda one: END.index(one.part.place))


def _detach(bpf: Bpf, place: int, one: Found) -> None:
    # Somebody else may have taken it away between the two calls.
    try:
        bpf.detach(place, _must_be_open(one), one.part.place)
    except BpfError as error:
        if error.errno != errno.ENOENT:
            raise


# --- which programs are ours ---------------------------------------------------------


def _ours(bpf: Bpf, where: Path, place: int, stack: ExitStack) -> Iterator[Found]:
    """List our programs at a cgroup; ``stack`` closes what is open of them."""
    notes: dict[int, Found] | None = None
    for part in PARTS:
        for number in bpf.query(place, part.place):
            try:
                program = bpf.program_by_id(number)
            except BpfError as error:
                if error.errno == errno.ENOENT:
                    continue  # taken away between the two questions
                if error.errno != errno.EPERM:
                    raise
                notes = _read_note(where) if notes is None else notes
                if number in notes and notes[number].part is part:
                    yield notes[number]
                continue
            stack.callback(os.close, program)
            info = bpf.program_info(program)
            known = part_of(info.name)
            if known and known[0] is part:
                yield Found(where, part, number, known[1], info.tag, program)


def _foreign(
    bpf: Bpf, where: Path, place: int, stack: ExitStack, ours: set[int]
) -> Iterator[Foreign]:
    """List what is not ours among the sock_ops programs, those of parents included."""
    known = ours | {one.id for one in _ours(bpf, where, place, stack)}
    for number in bpf.query(place, AttachType.CGROUP_SOCK_OPS, effective=True):
        if number in known:
            continue
        name = ""
        with contextlib.suppress(BpfError):
            program = bpf.program_by_id(number)
            stack.callback(os.close, program)
            name = bpf.program_info(program).name
        if part_of(name) is None:
            yield Foreign(number, name)


def _leave_note(bpf: Bpf, where: Path, loaded: Iterable[Loaded]) -> None:
    """Write down at the cgroup what was attached; not all kernels and users can."""
    rows = [
        f"{one.part.label} {bpf.program_info(one.descriptor).id} {one.tag}"
        for one in loaded
    ]
    with contextlib.suppress(OSError):
        os.setxattr(where, NOTE, "\n".join(rows).encode())


def _read_note(where: Path) -> dict[int, Found]:
    """Read what `attach` wrote, by id; it counts only for ids that are attached."""
    try:
        text = os.getxattr(where, NOTE).decode("ascii", "replace")
    except OSError:
        return {}
    rows = (line.split(" ") for line in text.splitlines())
    notes = {}
    for label, number, tag in (row for row in rows if len(row) == 3):
        known = part_of(label)
        if known and number.isdecimal():
            part, abi = known
            notes[int(number)] = Found(where, part, int(number), abi, tag)
    return notes
