"""The host's side of the scenarios: a plugin of pytest.

A test that is marked ``lab`` (or ``lab_long``) does not run on the host. All that were
chosen go to one guest, which is started when the first one's turn comes; their reports
come back one by one and look like any other test's. Those for another kernel come last,
and have a guest of their own. Where the lab cannot run they are skipped, and say why;
with PYSMC_LAB=require that is an error.

Within the guest (PYSMC_LAB_GUEST is set) the same tests simply run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from lab import bytecode, kernel, machine, needs
from lab.errors import GuestDied, LabError, LabMissing, NotOffered
from lab.places import ROOT, new_results
from lab.runner import kernel_of, keywords_of, limit_of

if TYPE_CHECKING:
    from pathlib import Path

MARKERS = {
    "lab": "runs in the guest with soft-RoCE (make lab); seconds=N is its limit there, "
    "kernel=SERIES another Linux than the usual one",
    "lab_long": "the same, and takes minutes (make lab-long)",
}
COLLECT_WAIT = 240.0
"""Seconds for the guest's pytest to import and collect."""
SLACK = 40.0
"""Seconds beyond a scenario's limit until the guest must have told of its end."""
COMPLAINT = re.compile(r"BUG:|WARNING:|Oops|Call Trace|blocked for more than|stall")
IN_GUEST = "PYSMC_LAB_GUEST"
LEFT_OUT = ("xdist", "xdist.looponfail", "pytest_cov", "anyio", "cacheprovider")
"""Plugins that the guest's pytest does without: each costs a part of a second."""


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known, and the lab where it is not the guest itself."""
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if IN_GUEST not in os.environ:
        config.pluginmanager.register(Lab(), "pysmc-lab")


def is_for_the_lab(item: pytest.Item) -> bool:
    """Tell whether a test is to run in the guest."""
    return any(item.get_closest_marker(name) for name in MARKERS)


class Lab:
    """Sends tests to the guest, and reports on them."""

    def __init__(self) -> None:
        self._why_not: str | None = None
        self._guest: Guest | None = None
        self._done: set[str] = set()
        self._words: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Let no quick run wait for a guest, and no clock of the host's count."""
        for item in items:
            if is_for_the_lab(item):
                item.add_marker("slow")
                # The limit is in the guest, and how long one waits for that is here.
                item.add_marker(pytest.mark.timeout(0), append=False)
        items.sort(key=order_of)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Report what the guest says about a test."""
        if not is_for_the_lab(item):
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        self._done.add(item.nodeid)
        # Nothing of this test was set up; what it shares with the one before ends here.
        item.session._setupstate.teardown_exact(nextitem)  # noqa: SLF001
        return True

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say where the results are."""
        self._end_the_guest()
        for line in self._words:
            terminalreporter.write_line(line)

    def pytest_unconfigure(self) -> None:
        """End the guest."""
        self._end_the_guest()

    def _end_the_guest(self) -> None:
        if self._guest is not None:
            self._guest.end()
            self._words += self._guest.words
            self._guest = None

    def _reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        why = self._reason_not_to_run(item.config)
        if not why:
            try:
                return self._guest_for(item).reports(item)
            except NotOffered as error:
                return [skipped(item, str(error))]
            except LabMissing as error:
                why = str(error)
        if needs.is_required():
            return [failed(item, f"{why} ({needs.WANTED}=require)")]
        return [skipped(item, why)]

    def _reason_not_to_run(self, config: pytest.Config) -> str:
        if self._why_not is None:
            self._why_not = needs.missing()
            if needs.is_off():
                self._why_not = f"the lab is off ({needs.WANTED}=off)"
            if hasattr(config, "workerinput"):
                self._why_not = "the lab has one guest for one process: make lab"
        return self._why_not

    def _guest_for(self, item: pytest.Item) -> Guest:
        """Give the guest of a test; another one is ended first."""
        if self._guest is None or item.nodeid not in self._guest.numbers:
            self._end_the_guest()
            series = kernel_of(item)
            self._guest = Guest(
                series,
                [
                    one
                    for one in item.session.items
                    if is_for_the_lab(one)
                    and kernel_of(one) == series
                    and one.nodeid not in self._done
                ],
            )
        return self._guest


class Guest:
    """One guest, from its start, at the first question, to its end.

    Args:
        series: Of its kernel.
        items: The tests that it is to run, in this order.
    """

    def __init__(self, series: str, items: list[pytest.Item]) -> None:
        self._series = series
        self._items = items
        self.numbers = {item.nodeid: number for number, item in enumerate(items)}
        self.words: list[str] = []
        """What is to be said at the end."""
        self._machine: machine.Machine | None = None
        self._missing: LabMissing | None = None
        self._open = contextlib.ExitStack()
        self._results: Path | None = None
        self._dead = ""

    def end(self) -> None:
        """End it."""
        self._open.close()

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Wait for what it says about a test.

        Raises:
            LabMissing: It cannot be had here.
        """
        try:
            if self._missing is not None:
                raise self._missing
            if self._dead:
                raise GuestDied(self._dead)
            if self._machine is None:
                self._machine = self._start()
            return self._wait(self._machine, item)
        except LabMissing as error:
            self._missing = error
            self._open.close()
            raise
        except LabError as error:
            self._dead = self._dead or f"an earlier scenario ended the guest: {error}"
            self._open.close()
            return [failed(item, f"{error}\nresults: {self._results}")]

    def _start(self) -> machine.Machine:
        self._open.enter_context(machine.only_one())
        self._results = results = new_results()
        names = "".join(f"{name}\n" for name in self.numbers)
        (results / "list").write_text(names, encoding="utf-8")
        files = sorted({name.partition("::")[0] for name in self.numbers})
        (results / "job").write_text(job(files), encoding="utf-8")
        begin = time.monotonic()
        bytecode.rewrite(files)
        setup = machine.prepare(results, series=self._series)
        whole = sum(limit_of(item) + SLACK for item in self._items)
        limit = machine.BOOT_WAIT + COLLECT_WAIT + whole
        guest = self._open.enter_context(machine.Machine(setup, limit))
        guest.wait("ready", machine.BOOT_WAIT)
        booted = time.monotonic() - begin
        guest.wait("collected", COLLECT_WAIT)
        took = time.monotonic() - begin
        where = f"Linux {setup.kernel.version} ({setup.accelerator})"
        when = f"up after {booted:.0f} s, collected after {took:.0f} s"
        self.words.append(f"Lab: {where}, {when}; results in {results}")
        return guest

    def _wait(
        self, guest: machine.Machine, item: pytest.Item
    ) -> list[pytest.TestReport]:
        name = f"{self.numbers[item.nodeid]}.json"
        path = guest.wait(name, limit_of(item) + SLACK)
        lines = complaints(json.loads(path.read_text(encoding="utf-8")))
        if lines:
            self.words.append(f"Lab: the kernel complained in {item.nodeid}:")
            self.words += [f"    {line}" for line in lines]
        return read_reports(item, path)


def order_of(item: pytest.Item) -> int:
    """Give a test's place: those for another kernel after the others."""
    if not is_for_the_lab(item):
        return 0
    return list(kernel.SERIES).index(kernel_of(item))


def complaints(data: dict[str, Any]) -> list[str]:
    """Give what the guest's kernel said that is a fault of its own.

    Args:
        data: What the guest wrote about one scenario.
    """
    return [line for line in data.get("kernel", []) if COMPLAINT.search(line)]


def job(files: list[str]) -> str:
    """Write what the guest runs: pytest, with the files of the scenarios."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "lab.runner"]
    words += [word for name in LEFT_OUT for word in ("-p", f"no:{name}")]
    names = " ".join(f"'{name}'" for name in files)
    return (
        f'cd "{ROOT}"\nexport PATH="{sys.prefix}/bin:$PATH" PYTHONPATH="{ROOT}/tools"\n'
        f"exec {' '.join(words)} {names}\n"
    )


def read_reports(item: pytest.Item, path: Path) -> list[pytest.TestReport]:
    """Make the reports of a test from what the guest wrote.

    Args:
        item: The test.
        path: The file.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if "error" in data:
        return [failed(item, f"{data['error']}\nresults: {path.parent}")]
    hook = item.config.hook
    reports = []
    for one in data["reports"]:
        report = hook.pytest_report_from_serializable(config=item.config, data=one)
        if report.failed:
            report.sections.append(("results of the lab", str(path.parent)))
        if isinstance(report.longrepr, list):
            # File, line and reason of a skip; JSON knows no tuple, pytest wants one.
            report.longrepr = tuple(report.longrepr)
        reports.append(report)
    return reports


def failed(item: pytest.Item, words: str) -> pytest.TestReport:
    """Make the report of a test about which the guest said nothing."""
    return pytest.TestReport(
        item.nodeid, item.location, keywords_of(item), "failed", words, "call"
    )


def skipped(item: pytest.Item, why: str) -> pytest.TestReport:
    """Make the report of a test that cannot run here."""
    place = (str(item.path), item.location[1] or 0, f"Skipped: {why}")
    return pytest.TestReport(
        item.nodeid, item.location, keywords_of(item), "skipped", place, "setup"
    )
