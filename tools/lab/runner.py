"""Runs the scenarios in the guest: a plugin of the pytest that is started there.

It imports and collects once. Each scenario then runs in a child forked from that, with
a cgroup of its own: what it opens, breaks or leaves behind ends with it, and one that
hangs is killed at its limit. The reports of a scenario are written as JSON when it has
ended; the host's pytest (`lab.plugin`) waits for them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from _pytest.runner import runtestprotocol

from lab import kernel
from lab.places import HERE

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARE = Path("/run/lab")
CGROUPS = Path("/sys/fs/cgroup")
FOLDER = "PYSMC_LAB_FOLDER"
"""Environment of a scenario: its own folder in the share, for captures and logs."""
DEFAULT_SECONDS = 60.0
LAST_WORDS_WAIT = 3.0
"""Seconds for a scenario to say where it hangs, before it is killed."""
REBUILD_WAIT = 15.0
"""Seconds for either half of building the network anew."""
KERNEL_LINES = 25


def limit_of(item: pytest.Item) -> float:
    """Give the seconds that a scenario may take in the guest."""
    return float(_said(item, "seconds", DEFAULT_SECONDS))


def kernel_of(item: pytest.Item) -> str:
    """Give the series of kernels that a scenario is for.

    Raises:
        UsageError: There is none of that name.
    """
    found = str(_said(item, "kernel", kernel.USUAL))
    if found not in kernel.SERIES:
        known = ", ".join(kernel.SERIES)
        message = f"{item.nodeid}: no kernel {found!r} in the lab, only {known}"
        raise pytest.UsageError(message)
    return found


def _said(item: pytest.Item, name: str, default: object) -> Any:
    """Give what the marker of a scenario says; the nearest one that says it."""
    for marker in ("lab_long", "lab"):
        for one in item.iter_markers(marker):
            if name in one.kwargs:
                return one.kwargs[name]
    return default


def keywords_of(item: pytest.Item) -> dict[str, Literal[1]]:
    """Give a test's keywords, as reports have them."""
    return {name: 1 for name in item.keywords}  # noqa: C420  # dict.fromkeys says int


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave what the host asked for, in its order."""
    wanted = (SHARE / "list").read_text(encoding="utf-8").splitlines()
    by_name = {item.nodeid: item for item in items}
    items[:] = [by_name[name] for name in wanted if name in by_name]


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool:
    """Run all of them, whatever becomes of each."""
    wanted = (SHARE / "list").read_text(encoding="utf-8").splitlines()
    by_name = {item.nodeid: item for item in session.items}
    log = KernelLog()
    gc.collect()
    gc.freeze()
    (SHARE / "collected").write_text(f"{len(by_name)}\n", encoding="ascii")
    for number, name in enumerate(wanted):
        if name in by_name:
            Scenario(by_name[name], number, log).run()
        else:
            words = {"error": "the guest has not collected it: see the file output"}
            _write(SHARE / f"{number}.json", words)
    return True


class KernelLog:
    """What the kernel says while a scenario runs."""

    def __init__(self) -> None:
        self._file = -1
        with contextlib.suppress(OSError):  # only root may
            self._file = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        self.take()

    def take(self) -> list[str]:
        """Give the lines since the last time."""
        lines: list[str] = []
        while self._file >= 0:
            try:
                record = os.read(self._file, 8192)
            except BlockingIOError:
                return lines
            except BrokenPipeError:  # some were overwritten before they were read
                continue
            head, _, text = record.decode("utf-8", "replace").partition(";")
            seconds = int(head.split(",")[2]) / 1e6
            lines.append(f"[{seconds:12.6f}] {text.splitlines()[0]}")
        return lines


class Scenario:
    """One scenario, from its child's birth to the last process that it left.

    Args:
        item: The test.
        number: Its place in the host's list; names its files.
        log: Of the kernel.
    """

    def __init__(self, item: pytest.Item, number: int, log: KernelLog) -> None:
        self._item = item
        self._number = number
        self._log = log
        self._limit = limit_of(item)
        self._folder = SHARE / f"{number}-{item.name.partition('[')[0]}"
        self._cgroup = CGROUPS / f"scenario-{number}"
        self._result = SHARE / f"{number}.json"

    def run(self) -> None:
        """Run it; writes the result."""
        print(f"lab: {self._item.nodeid}", file=sys.__stderr__, flush=True)
        self._folder.mkdir()
        self._cgroup.mkdir()
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            self._be_the_child()
        reports = self._collect(child, begin)
        left = list(self._end_the_rest())
        is_bad = any(report["outcome"] == "failed" for report in reports)
        kernel = self._log.take()
        for report in reports:
            if report["outcome"] == "failed":
                tail = "\n".join(kernel[-KERNEL_LINES:]) or "(nothing)"
                report["sections"].append(("the guest's kernel", tail))
                if left:
                    report["sections"].append(("processes left", "\n".join(left)))
        facts = {"left": left, "kernel": kernel, "seconds": time.monotonic() - begin}
        if is_bad:
            rebuild_the_network()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()
        _write(self._result, {"reports": reports, **facts})

    def _be_the_child(self) -> None:
        code = 1
        try:
            os.setsid()
            (self._cgroup / "cgroup.procs").write_text(str(os.getpid()))
            os.environ[FOLDER] = str(self._folder)
            with (self._folder / "stacks").open("w") as stacks:
                faulthandler.enable(stacks, all_threads=True)
                # No next item: whatever fixtures it used are torn down here.
                found = runtestprotocol(self._item, log=False, nextitem=None)
                faulthandler.disable()
            (self._folder / "stacks").unlink()
            hook = self._item.config.hook
            data = [
                hook.pytest_report_to_serializable(
                    config=self._item.config, report=report
                )
                for report in found
            ]
            _write(self._folder / "reports.json", data)
            code = 0
        except BaseException:  # noqa: BLE001  # nothing may escape into the parent's loop
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)

    def _collect(self, child: int, begin: float) -> list[dict[str, Any]]:
        """Wait for the child; gives its reports, or one about its end."""
        descriptor = os.pidfd_open(child)
        try:
            is_over = bool(select.select([descriptor], [], [], self._limit)[0])
            if not is_over:
                os.kill(child, signal.SIGABRT)
                if not select.select([descriptor], [], [], LAST_WORDS_WAIT)[0]:
                    os.kill(child, signal.SIGKILL)
        finally:
            os.close(descriptor)
        _, status = os.waitpid(child, 0)
        path = self._folder / "reports.json"
        if path.exists():
            reports: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))
            path.unlink()
            return reports
        words = (
            f"it ended with {os.waitstatus_to_exitcode(status)} and without a report"
        )
        if not is_over:
            words = f"it did not end within its {self._limit:g} seconds"
        return [self._report(words, time.monotonic() - begin)]

    def _report(self, words: str, seconds: float) -> dict[str, Any]:
        """Make a report in the place of one that the child has not written."""
        item = self._item
        stacks = self._folder / "stacks"
        if stacks.exists():
            words += f"\n{stacks.read_text(encoding='utf-8', errors='replace')}"
        report = pytest.TestReport(
            item.nodeid, item.location, keywords_of(item), "failed",
            words, "call", duration=seconds,
        )  # fmt: skip
        capture = item.config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            out, err = capture.read_global_capture()
            report.sections += [("Captured stdout call", out)] if out else []
            report.sections += [("Captured stderr call", err)] if err else []
        data = item.config.hook.pytest_report_to_serializable(
            config=item.config, report=report
        )
        return dict(data)

    def _is_populated(self) -> bool:
        try:
            return "populated 1" in (self._cgroup / "cgroup.events").read_text()
        except FileNotFoundError:
            return False

    def _end_the_rest(self) -> Iterator[str]:
        """End what the scenario has left; gives the command lines."""
        for word in (self._cgroup / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                line = Path("/proc", word, "cmdline").read_bytes()
                yield line.replace(b"\0", b" ").decode("utf-8", "replace").strip()
        (self._cgroup / "cgroup.kill").write_text("1")
        end = time.monotonic() + LAST_WORDS_WAIT
        while self._is_populated() and time.monotonic() < end:
            time.sleep(0.01)
        with contextlib.suppress(OSError):
            self._cgroup.rmdir()


def rebuild_the_network() -> None:
    """Take away what a scenario that failed may have left, and build all anew."""
    script = str(HERE / "guest" / "network")
    for what in ("down", "up"):
        # What a kernel has lost it may wait for without end; the reports matter more.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["sh", script, what], check=False, timeout=REBUILD_WAIT)


def _write(path: Path, data: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data), encoding="utf-8")
    part.rename(path)
