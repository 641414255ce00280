"""Install, show or remove the eBPF programs that set the SMC option on SYN and SYN-ACK.

Attached once to a cgroup, they serve all processes in it, without any privilege of
theirs. To attach needs CAP_BPF and CAP_NET_ADMIN; to see all of them, and to remove
them, CAP_SYS_ADMIN too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from pysmc.discovery.option.install import Found

HELP = "the eBPF programs for the SMC option: attach, status, detach, listing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    attach = actions.add_parser("attach", help="install the programs for a cgroup")
    status = actions.add_parser("status", help="tell where they are installed")
    detach = actions.add_parser("detach", help="remove them from a cgroup")
    actions.add_parser("listing", help="print the programs, rule by rule")
    for action, verb in ((attach, "pin them there instead of attaching them"),
                         (detach, "remove the pins there instead")):  # fmt: skip
        where = action.add_mutually_exclusive_group()
        where.add_argument(
            "--cgroup",
            type=Path,
            metavar="PATH",
            help="directory of a cgroup of version 2 (default: the root of all)",
        )
        where.add_argument(
            "--pin", type=Path, metavar="DIR", help=f"{verb}, for BPFProgram="
        )
    status.add_argument("--json", action="store_true", help="print one JSON object")


def command(options: argparse.Namespace) -> int:
    """Carry out one action; 1 when it failed, or when nothing works here."""
    from pysmc.discovery.option.bpf import BpfError
    from pysmc.discovery.option.cgroup import NoCgroupError
    from pysmc.discovery.option.faults import explain, this_process

    actions = {
        "attach": _attach, "status": _status, "detach": _detach, "listing": _listing,
    }  # fmt: skip
    try:
        return actions[options.action](options)
    except BpfError as error:
        problem = str(explain(error, this_process()))
    except BrokenPipeError:
        raise  # whoever read our output has gone: `main` knows
    except (OSError, NoCgroupError) as error:
        problem = str(error)
    print(f"pysmc option {options.action}: {problem}", file=sys.stderr)
    return 1


def _attach(options: argparse.Namespace) -> int:
    from pysmc.discovery.option.install import attach
    from pysmc.discovery.option.pins import pin

    if options.pin is not None:
        is_new = pin(options.pin)
        print(f"{'pinned in' if is_new else 'were pinned already in'} {options.pin}")
        return 0
    done = attach(options.cgroup)
    if not done.is_new:
        print(f"were attached already to {done.cgroup}")
    else:
        print(f"attached to {done.cgroup}")
    if done.replaced:
        print(f"{done.replaced} programs of an earlier set-up were replaced")
    for one in done.foreign:
        print(
            f"warning: sock_ops program {one} runs for the same sockets;"
            " if it replies to calls that are not its own, it may disturb them",
            file=sys.stderr,
        )
    return 0


def _detach(options: argparse.Namespace) -> int:
    from pysmc.discovery.option.install import detach
    from pysmc.discovery.option.pins import unpin

    if options.pin is not None:
        print(f"removed {unpin(options.pin)} pins")
    else:
        print(f"removed {detach(options.cgroup)} programs")
    return 0


def _status(options: argparse.Namespace) -> int:
    report = _report()
    if options.json:
        print(json.dumps(report))
    else:
        print(_words(report))
    return 0 if report["here"] else 1


def _report() -> dict[str, Any]:
    from pysmc.discovery.option.bpf import BpfError
    from pysmc.discovery.option.cgroup import NoCgroupError
    from pysmc.discovery.option.faults import explain, this_process
    from pysmc.discovery.option.install import find_all
    from pysmc.discovery.option.trial import try_option

    trial = try_option()
    found: Sequence[Found] = ()
    unseen = ""
    try:
        found = find_all()
    except BpfError as error:
        unseen = f"Other cgroups cannot be seen: {explain(error, this_process()).cause}"
    except (OSError, NoCgroupError) as error:
        unseen = f"Other cgroups cannot be seen: {error}."
    programs = [
        {
            "cgroup": str(one.cgroup),
            "program": one.part.name,
            "id": one.id,
            "abi": one.abi,
            "tag": one.tag,
        }
        for one in found
    ]
    return {
        "installed": trial.abi is not None or bool(found),
        "abi": trial.abi,
        "cgroups": sorted({str(one.cgroup) for one in found}),
        "programs": programs,
        "here": trial.works,
        "reason": trial.reason or None,
        "unseen": unseen or None,
    }


def _words(report: dict[str, Any]) -> str:
    lines = []
    if report["here"]:
        lines.append(f"works for this process (version {report['abi']})")
    else:
        lines.append(f"does not work for this process: {report['reason']}")
    for cgroup in report["cgroups"]:
        rows = [row for row in report["programs"] if row["cgroup"] == cgroup]
        names = ", ".join(f"{row['program']} (id {row['id']})" for row in rows)
        lines.append(f"attached to {cgroup}: {names}")
    if report["unseen"]:
        lines.append(report["unseen"])
    elif not report["cgroups"]:
        lines.append("attached to no cgroup")
    return "\n".join(lines)


def _listing(options: argparse.Namespace) -> int:
    from pysmc.discovery.option.loading import assemble
    from pysmc.discovery.option.machine import this_machine

    del options
    for name, program in assemble(this_machine()).items():
        print(
            f"{name}, {len(program.instructions)} instructions\n\n{program.listing()}"
        )
    return 0
