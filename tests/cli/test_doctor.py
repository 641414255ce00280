"""``pysmc doctor``: what it prints, its exit codes, and the real thing."""

from __future__ import annotations

import json
import logging
import os
import re
from functools import partial

import pytest

from pysmc.cli import doctor, main
from pysmc.cli.checks import catalogue
from pysmc.cli.checks.check import Report, Status, check, fail, ok, skip, warn
from pysmc.cli.checks.machine import Machine

STATUSES = {"ok", "warn", "fail", "skip"}
LONG = "A sentence of some words that is longer than a line of a terminal can be. "


def made(name, look):
    return check(name, looks_at="", means="Means.", remedy="Do.")(look)


def gives(finding, machine):
    return finding


@pytest.fixture
def found(monkeypatch):
    """Have the doctor run checks that find what is given, by name."""

    def put(**findings):
        checks = [
            made(name.replace("_", "."), partial(gives, finding))
            for name, finding in findings.items()
        ]
        monkeypatch.setattr(catalogue, "CHECKS", checks)

    return put


class TestExitCode:
    @pytest.mark.parametrize(
        ("shm", "verbs", "code"),
        [
            (ok("S."), ok("V."), 0),
            (ok("S."), fail("V."), 0),
            (fail("S."), warn("V."), 0),
            (fail("S."), fail("V."), 1),
            (fail("S."), skip("V."), 1),
            (skip("S."), skip("V."), 1),
        ],
    )
    def test_one_fabric_is_enough(self, shm, verbs, code, found, capsys):
        found(kernel=warn("K."), shm_a=shm, verbs_a=verbs)
        assert main(["doctor", "--json"]) == code
        fabrics = json.loads(capsys.readouterr().out)["fabrics"]
        assert fabrics == {"shm": str(shm.status), "verbs": str(verbs.status)}

    def test_a_mistake(self, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--no-such-option"])
        assert ended.value.code == 2
        assert capsys.readouterr().out == ""


class TestJson:
    def test_exactly_this(self, found, capsys):
        found(kernel=ok("Linux."), shm_a=warn("Seen."), verbs_a=fail("No.", "M.", "D."))
        assert main(["doctor", "--json"]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert json.loads(captured.out) == {
            "checks": [
                {"name": "kernel", "status": "ok", "detail": "Linux.", "remedy": ""},
                {
                    "name": "shm.a",
                    "status": "warn",
                    "detail": "Seen. Means.",
                    "remedy": "Do.",
                },
                {
                    "name": "verbs.a",
                    "status": "fail",
                    "detail": "No. M.",
                    "remedy": "D.",
                },
            ],
            "fabrics": {"shm": "warn", "verbs": "fail"},
        }

    def test_an_error_inside_is_part_of_it(self, monkeypatch, capsys):
        def look(machine):
            raise RuntimeError("broken")

        monkeypatch.setattr(catalogue, "CHECKS", [made("shm.a", look)])
        assert main(["doctor", "--json"]) == 1
        (row,) = json.loads(capsys.readouterr().out)["checks"]
        assert row["status"] == "fail"
        assert "RuntimeError: broken" in row["detail"]


def report(name, status, seen, means="", remedy=""):
    return Report(name, Status(status), seen, means, remedy)


class TestLines:
    FABRICS = {"shm": Status.OK, "verbs": Status.SKIP}  # noqa: RUF012

    def render(self, reports, fabrics=None, columns=80, *, colour=False):
        fabrics = self.FABRICS if fabrics is None else fabrics
        return doctor.render(reports, fabrics, columns, colour=colour)

    def test_all_is_well(self):
        reports = [report("kernel", "ok", "Linux."), report("shm.a", "ok", "Good.")]
        assert self.render(reports) == [
            "ok    kernel  Linux.",
            "ok    shm.a   Good.",
            "",
            "ok    shm works",
            "skip  verbs was not looked at",
        ]

    def test_what_it_means_and_what_to_do_stand_below(self):
        lines = self.render([report("verbs.a", "fail", "No.", "Means.", "Do it.")])
        assert lines[:3] == [
            "fail  verbs.a  No.",
            "               Means.",
            "               -> Do it.",
        ]

    @pytest.mark.parametrize("columns", [30, 60, 80, 100])
    def test_lines_fit_the_terminal_where_words_do(self, columns):
        lines = self.render(
            [report("verbs.a", "warn", LONG, LONG, LONG)], columns=columns
        )
        assert max(map(len, lines[:-3])) <= max(columns, 45)
        assert " ".join(" ".join(lines[:-3]).split()).count(LONG.strip()) == 3

    def test_a_command_is_not_cut_within_a_word(self):
        text = "sysctl -w net.ipv4.tcp_syncookies=1 " * 4
        lines = self.render([report("a", "fail", "No.", remedy=text)], columns=50)
        assert "".join(lines).count("net.ipv4.tcp_syncookies=1") == 4

    def test_the_verdict_names_what_speaks_against_it(self):
        reports = [
            report("kernel", "warn", "Old."),
            report("shm.a", "warn", "Hm."),
            report("verbs.a", "fail", "No."),
            report("verbs.b", "warn", "Hm."),
            report("verbs.c", "fail", "No."),
        ]
        fabrics = {"shm": Status.WARN, "verbs": Status.FAIL}
        assert self.render(reports, fabrics)[-2:] == [
            "warn  shm works, but: see shm.a",
            "fail  verbs does not work: see verbs.a, verbs.c",
        ]

    def test_colours_change_nothing_else(self):
        reports = [report(s, s, "It.") for s in sorted(STATUSES)]
        plain = self.render(reports)
        coloured = self.render(reports, colour=True)
        assert [re.sub(r"\033\[\d+m", "", line) for line in coloured] == plain
        assert "\033[31mfail\033[0m" in coloured[0]

    @pytest.mark.parametrize(
        ("is_terminal", "environ", "coloured"),
        [(True, {}, True), (True, {"NO_COLOR": "1"}, False), (False, {}, False)],
    )
    def test_when_there_is_colour(
        self, is_terminal, environ, coloured, found, monkeypatch, capsys
    ):
        found(shm_a=ok("It."))
        monkeypatch.delenv("NO_COLOR", raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
        assert main(["doctor"]) == 0
        assert ("\033[" in capsys.readouterr().out) is coloured


class TestTheRealThing:
    @pytest.mark.slow
    @pytest.mark.skipif(os.geteuid() == 65534, reason="nobody cannot use shm")
    def test_this_machine(self, pysmc):
        done = pysmc("doctor", "--json")
        assert (done.code, done.err) == (0, "")
        assert done.out.count("\n") == 1
        result = json.loads(done.out)
        assert set(result) == {"checks", "fabrics"}
        assert set(result["fabrics"]) == {"shm", "verbs"}
        assert set(result["fabrics"].values()) <= STATUSES
        assert result["fabrics"]["shm"] == "ok"
        names = [item.name for item in catalogue.CHECKS]
        assert [row["name"] for row in result["checks"]] == names
        for row in result["checks"]:
            assert set(row) == {"name", "status", "detail", "remedy"}
            assert row["status"] in STATUSES
            assert row["detail"].endswith((".", ")"))
            assert bool(row["remedy"]) or row["status"] in {"ok", "skip"}

    @pytest.mark.slow
    def test_for_people(self, pysmc):
        done = pysmc("doctor", env={"COLUMNS": "80", "PYSMC_FABRIC": "verbs"})
        assert (done.code, done.err) == (0, "")
        assert "\033[" not in done.out
        lines = done.out.splitlines()
        assert max(map(len, lines)) <= 80
        assert lines[-2].startswith("ok    shm works")
        assert "PYSMC_FABRICS is." in done.out

    def test_nothing_is_logged_beside_the_report(self, monkeypatch, capsys):
        def look(machine):
            logging.getLogger("pysmc.fabric").warning("by the way")
            return ok("It.")

        monkeypatch.setattr(catalogue, "CHECKS", [made("shm.a", look)])
        assert main(["doctor"]) == 0
        assert capsys.readouterr().err == ""


class TestTheCatalogue:
    def test_names_are_unique_and_needs_come_first(self):
        seen: set[str] = set()
        for item in catalogue.CHECKS:
            assert item.name not in seen
            assert set(item.needs) <= seen
            seen.add(item.name)
            assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)?", item.name)

    def test_every_check_says_what_it_is_about(self):
        for item in catalogue.CHECKS:
            assert item.looks_at.endswith(".")
            assert 0 < item.seconds <= 60

    def test_a_machine_of_nothing_breaks_no_check(self, tmp_path):
        here = Machine(root=tmp_path, environ={}, system="Plan9", release="?")
        for item in catalogue.CHECKS:
            finding = item.look(here)
            assert finding.seen
            assert finding.status in STATUSES
