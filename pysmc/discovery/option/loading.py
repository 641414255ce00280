"""The three programs with their maps, loaded into the kernel and open.

Decides their names, their kinds and how many there are; a name tells the version. What
was loaded goes with its descriptors, unless it is attached or pinned.

Source: bpf(2).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from pysmc.discovery.option import programs
from pysmc.discovery.option.bpf import AttachType, ProgramType, btf_of_u32
from pysmc.discovery.option.sockets import ABI_VERSION

if TYPE_CHECKING:
    from contextlib import ExitStack

    from pysmc.discovery.option.assembler import Program
    from pysmc.discovery.option.bpf import Bpf
    from pysmc.discovery.option.machine import Machine

__all__ = ["PARTS", "Loaded", "Part", "assemble", "load", "part_of"]

PREFIX: Final = "pysmc"
"""All our programs' names begin with it; the ABI version follows."""
LISTENERS_MOST: Final = 16_384
"""Listeners that asked, in all network namespaces; one more costs the one that was not
connected to for longest its option."""


class Part(NamedTuple):
    """One of the three programs and its place."""

    name: str
    """As in the file names of pins and in `BPFProgram=`."""
    short: str
    """As in the kernel, which keeps 15 characters, the prefix among them."""
    kind: ProgramType
    place: AttachType

    @property
    def label(self) -> str:
        """The program's name in the kernel."""
        return f"{PREFIX}{ABI_VERSION}_{self.short}"


PARTS: Final = (
    # The one that takes the opt-in comes last and goes first: who can ask is heard.
    Part("sock_ops", "sock_ops", ProgramType.SOCK_OPS, AttachType.CGROUP_SOCK_OPS),
    Part(
        "getsockopt",
        "getopt",
        ProgramType.CGROUP_SOCKOPT,
        AttachType.CGROUP_GETSOCKOPT,
    ),
    Part(
        "setsockopt",
        "setopt",
        ProgramType.CGROUP_SOCKOPT,
        AttachType.CGROUP_SETSOCKOPT,
    ),
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A program that is open."""

    part: Part
    descriptor: int
    tag: str
    """16 digits: the kernel's hash of the instructions."""


def part_of(label: str) -> tuple[Part, int] | None:
    """Tell by a program's name in the kernel which part it is, and of which version.

    Returns:
        None when it is not one of ours.
    """
    head, _, short = label.partition("_")
    version = head.removeprefix(PREFIX)
    for part in PARTS:
        if part.short == short and head != version and version.isdecimal():
            return part, int(version)
    return None


def assemble(machine: Machine) -> dict[str, Program]:
    """Assemble the programs for a machine, by the name of their part."""
    order, page = machine.byteorder, machine.page_bytes
    return {
        "sock_ops": programs.sock_ops(order),
        "getsockopt": programs.getsockopt(order, page),
        "setsockopt": programs.setsockopt(order, page),
    }


def load(stack: ExitStack, bpf: Bpf, machine: Machine) -> list[Loaded]:
    """Load maps and programs.

    Args:
        stack: Closes all descriptors at its end.
        bpf: The kernel.
        machine: What it runs on.

    Returns:
        The programs, in the order of `PARTS`.

    Raises:
        BpfError: A step failed.
    """

    def own(number: int) -> int:
        stack.callback(os.close, number)
        return number

    btf = own(bpf.load_btf(btf_of_u32(machine.byteorder)))
    storage = bpf.create_socket_storage(f"{PREFIX}_sockets", btf)
    maps = {programs.SOCKETS: own(storage)}
    table = bpf.create_lru_hash(
        f"{PREFIX}_listeners", programs.KEY_BYTES, LISTENERS_MOST
    )
    maps[programs.LISTENERS] = own(table)
    assembled = assemble(machine)
    loaded = []
    for part in PARTS:
        code = assembled[part.name].code(maps)
        number = own(bpf.load_program(part.label, part.kind, part.place, code))
        loaded.append(Loaded(part, number, bpf.program_info(number).tag))
    return loaded
