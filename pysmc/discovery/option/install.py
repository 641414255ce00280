"""Putting the programs into a cgroup, looking for them, taking them away.

Decides what has to be loaded, in which order it is attached, and what a failure means.
The cgroup holds the programs: they outlive this process and go with the cgroup, or at
a reboot. Needs CAP_BPF and CAP_NET_ADMIN, and nothing else, to attach; the kernel shows
the names of programs only to CAP_SYS_ADMIN, so `attach` also leaves a note, an extended
attribute, at the cgroup.

Source: bpf(2), capabilities(7); kernel counterpart: kernel/bpf/cgroup.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from pysmc.discovery.option import programs
from pysmc.discovery.option.bpf import AttachType, Bpf, ProgramType, btf_of_u32
from pysmc.discovery.option.cgroup import mount_point
from pysmc.discovery.option.machine import this_machine
from pysmc.discovery.option.sockets import ABI_VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pysmc.discovery.option.machine import Machine

__all__ = ["Attached", "attach", "detach"]

PREFIX: Final = "pysmc"
"""All our programs' names begin with it; the ABI version follows."""
LISTENERS_MOST: Final = 16_384
"""Listeners that asked, in all network namespaces; one more costs the oldest."""
NOTE: Final = "user.pysmc.option"
"""Extended attribute of a cgroup: ids and tags of what was attached."""


class _Part(NamedTuple):
    """One of the three programs and its place."""

    name: str
    kind: ProgramType
    place: AttachType


PARTS: Final = (
    # The one that takes the opt-in comes last and goes first: whoever can ask is heard.
    _Part("sock_ops", ProgramType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS),
    _Part("getopt", ProgramType.CGROUP_SOCKOPT, AttachType.CGROUP_GETSOCKOPT),
    _Part("setopt", ProgramType.CGROUP_SOCKOPT, AttachType.CGROUP_SETSOCKOPT),
)


@dataclass(frozen=True, slots=True)
class Attached:
    """What `attach` did."""

    cgroup: Path
    is_new: bool
    """False when the same programs were there already."""
    foreign: tuple[int, ...]
    """Ids of sock_ops programs of others that run for this cgroup too."""


@dataclass(slots=True)
class _Loaded:
    """Open programs, by the name of their part."""

    programs: dict[str, int] = field(default_factory=dict)


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
        BpfError: A step failed; nothing is left attached.
        NoCgroupError: There is no cgroup2.
        OSError: The directory cannot be opened.
    """
    bpf = bpf or Bpf()
    where = cgroup or mount_point()
    with ExitStack() as stack:
        place = _open_directory(stack, where)
        loaded = _load(stack, bpf, machine or this_machine())
        tags = {name: bpf.program_info(fd).tag for name, fd in loaded.items()}
        old = list(_ours(bpf, place, stack))
        is_new = {(part.name, tag) for part, _, _, tag in old} != set(tags.items())
        if is_new:
            _attach_all(bpf, place, loaded)
            for part, _, program, _ in old:
                bpf.detach(place, program, part.place)
        known = {number for _, number, _, _ in _ours(bpf, place, stack)}
        there = bpf.query(place, AttachType.CGROUP_SOCK_OPS, effective=True)
        return Attached(where, is_new, tuple(n for n in there if n not in known))


def detach(cgroup: Path | None = None, *, bpf: Bpf | None = None) -> int:
    """Take all programs of ours away from a cgroup; gives their number.

    Raises:
        BpfError: A step failed; the rest was tried nevertheless.
        NoCgroupError: There is no cgroup2.
        OSError: The directory cannot be opened.
    """
    bpf = bpf or Bpf()
    with ExitStack() as stack:
        place = _open_directory(stack, cgroup or mount_point())
        found = list(_ours(bpf, place, stack))
        for part, _, program, _ in reversed(found):
            bpf.detach(place, program, part.place)
        return len(found)


def _open_directory(stack: ExitStack, path: Path) -> int:
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, number)
    return number


def _load(stack: ExitStack, bpf: Bpf, machine: Machine) -> dict[str, int]:
    """Load maps and programs; gives the programs' descriptors, which ``stack`` owns."""

    def own(number: int) -> int:
        stack.callback(os.close, number)
        return number

    order = machine.byteorder
    btf = own(bpf.load_btf(btf_of_u32(order)))
    maps = {
        programs.SOCKETS: own(bpf.create_socket_storage(f"{PREFIX}_sockets", btf)),
        programs.LISTENERS: own(
            bpf.create_lru_hash(
                f"{PREFIX}_listeners", programs.KEY_BYTES, LISTENERS_MOST
            )
        ),
    }
    assembled = {
        "sock_ops": programs.sock_ops(order),
        "getopt": programs.getsockopt(order, machine.page_bytes),
        "setopt": programs.setsockopt(order, machine.page_bytes),
    }
    return {
        part.name: own(
            bpf.load_program(
                f"{PREFIX}{ABI_VERSION}_{part.name}",
                part.kind,
                part.place,
                assembled[part.name].code(maps),
            )
        )
        for part in PARTS
    }


def _attach_all(bpf: Bpf, place: int, loaded: dict[str, int]) -> None:
    done: list[_Part] = []
    try:
        for part in PARTS:
            bpf.attach(place, loaded[part.name], part.place)
            done.append(part)
    except OSError:
        for part in reversed(done):
            with contextlib.suppress(OSError):
                bpf.detach(place, loaded[part.name], part.place)
        raise


def _ours(
    bpf: Bpf, place: int, stack: ExitStack
) -> Iterator[tuple[_Part, int, int, str]]:
    """List our programs at a cgroup: part, id, descriptor, tag."""
    for part in PARTS:
        for number in bpf.query(place, part.place):
            try:
                program = bpf.program_by_id(number)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue  # detached between the two questions
                raise
            stack.callback(os.close, program)
            info = bpf.program_info(program)
            if info.name.startswith(PREFIX) and info.name.endswith(f"_{part.name}"):
                yield part, number, program, info.tag
