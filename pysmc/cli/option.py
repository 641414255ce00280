"""Install, show or remove the eBPF programs that set the SMC option on SYN and SYN-ACK.

Attached once to a cgroup, they serve all processes in it, without any privilege of
theirs. To attach needs CAP_BPF and CAP_NET_ADMIN; to show and to remove CAP_SYS_ADMIN.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

HELP = "the eBPF programs for the SMC option: attach, status, detach"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    attach = actions.add_parser("attach", help="install the programs for a cgroup")
    status = actions.add_parser("status", help="tell where they are installed")
    detach = actions.add_parser("detach", help="remove them from a cgroup")
    for action in (attach, detach):
        action.add_argument(
            "--cgroup",
            type=Path,
            metavar="PATH",
            help="directory of a cgroup of version 2 (default: the root of all)",
        )
    status.add_argument("--json", action="store_true", help="print one JSON object")


def command(options: argparse.Namespace) -> int:
    """Carry out one action; 1 when it failed, or when nothing is installed here."""
    from pysmc.discovery.option.cgroup import NoCgroupError

    actions = {"attach": _attach, "status": _status, "detach": _detach}
    try:
        return actions[options.action](options)
    except (OSError, NoCgroupError) as error:
        print(f"pysmc option {options.action}: {error}", file=sys.stderr)
        return 1


def _attach(options: argparse.Namespace) -> int:
    from pysmc.discovery.option.install import attach

    done = attach(options.cgroup)
    print(f"{'attached to' if done.is_new else 'is attached to'} {done.cgroup}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from pysmc.discovery.option.sockets import ABI_VERSION, installed_abi

    abi = installed_abi()
    here = abi == ABI_VERSION
    if options.json:
        print(json.dumps({"installed": abi is not None, "abi": abi, "here": here}))
    else:
        print("works here" if here else "is not installed here")
    return 0 if here else 1


def _detach(options: argparse.Namespace) -> int:
    from pysmc.discovery.option.install import detach

    print(f"removed {detach(options.cgroup)} programs")
    return 0
