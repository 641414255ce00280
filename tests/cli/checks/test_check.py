"""How checks are run: in order, within their time, whatever they raise."""

from __future__ import annotations

import threading

import pytest

from pysmc.cli.checks.check import (
    Finding,
    Status,
    check,
    examine,
    fail,
    ok,
    skip,
    verdict,
    warn,
)

MEANS, REMEDY = "It means something.", "Do something."


def made(name, look, **options):
    make = check(name, looks_at="It.", means=MEANS, remedy=REMEDY, **options)
    return make(look)


def gives(name, finding, **options):
    return made(name, lambda machine: finding, **options)


@pytest.mark.parametrize(
    ("finding", "detail", "remedy"),
    [
        (ok("Seen."), "Seen.", ""),
        (skip("Seen."), "Seen.", ""),
        (skip("Seen.", "Ask."), "Seen.", "Ask."),
        (warn("Seen."), f"Seen. {MEANS}", REMEDY),
        (fail("Seen."), f"Seen. {MEANS}", REMEDY),
        (fail("Seen.", "Worse."), "Seen. Worse.", REMEDY),
        (warn("Seen.", remedy="Other."), f"Seen. {MEANS}", "Other."),
    ],
)
def test_what_a_finding_leaves_open_the_check_says(finding, detail, remedy, machine):
    (report,) = examine(machine(), [gives("a", finding)])
    assert report.as_json() == {
        "name": "a",
        "status": str(finding.status),
        "detail": detail,
        "remedy": remedy,
    }


def test_checks_see_the_machine_and_run_in_order(machine):
    here = machine()
    seen = []

    def look(name):
        def run(given):
            seen.append((name, given))
            return ok(name)

        return made(name, run)

    reports = examine(here, [look("b"), look("a"), look("c")])
    assert [report.name for report in reports] == ["b", "a", "c"]
    assert seen == [("b", here), ("a", here), ("c", here)]


@pytest.mark.parametrize(
    ("first", "expected"), [(ok, "ok"), (warn, "ok"), (fail, "skip"), (skip, "skip")]
)
def test_what_a_check_needs_has_to_pass(first, expected, machine):
    reports = examine(
        machine(), [gives("a", first("A.")), gives("b", ok("B."), needs=("a",))]
    )
    assert reports[1].status == expected
    if expected == "skip":
        assert reports[1].as_json()["detail"] == "Wants a to pass first."
        assert reports[1].remedy == ""


@pytest.mark.parametrize(
    "error", [ValueError("no number"), SystemExit(3), KeyError("x")]
)
def test_an_error_of_a_check_is_a_failure_of_that_check_alone(error, machine):
    def look(machine):
        raise error

    reports = examine(machine(), [made("a", look), gives("b", ok("B."))])
    assert [report.status for report in reports] == ["fail", "ok"]
    assert f"{type(error).__name__}: {error}" in reports[0].seen
    assert "Report it" in reports[0].remedy


def test_a_check_that_does_not_come_back_is_left(machine):
    end = threading.Event()

    def look(machine):
        end.wait()
        return ok("Late.")

    reports = examine(machine(), [made("a", look, seconds=0.01), gives("b", ok("B."))])
    end.set()
    assert [report.status for report in reports] == ["fail", "ok"]
    assert reports[0].seen == "The check itself failed: no answer within 0.01 seconds."


def test_without_a_thread_for_it(machine, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    (report,) = examine(machine(), [gives("a", ok("A."))])
    assert report.status == "fail"
    assert report.seen == "The check itself failed: can't start new thread."


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([ok, ok], Status.OK),
        ([ok, skip], Status.OK),
        ([ok, warn, skip], Status.WARN),
        ([warn, fail, ok], Status.FAIL),
        ([skip, skip], Status.SKIP),
        ([], Status.SKIP),
    ],
)
def test_the_verdict_is_the_worst_of_a_fabric(findings, expected, machine):
    checks = [gives(f"shm.{n}", make("It.")) for n, make in enumerate(findings)]
    others = [gives("shm_like.x", fail("No.")), gives("verbs.x", fail("No."))]
    assert verdict("shm", examine(machine(), [*checks, *others])) is expected


def test_a_finding_is_not_a_status_of_its_own():
    assert Finding(Status.OK, "Seen.") == ok("Seen.")
