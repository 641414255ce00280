"""``pysmc decode``: any message in words, and helpful refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pysmc.cli import main

VECTORS = Path(__file__).resolve().parents[2] / "proto" / "vectors"
CDC = "fe2c0001000002020000000000000005" + "00" * 28


def vectors(plane):
    rows = json.loads((VECTORS / f"{plane}.json").read_text())["vectors"]
    return [pytest.param(row, id=row["id"]) for row in rows]


@pytest.mark.parametrize("row", [*vectors("clc"), *vectors("llc"), *vectors("cdc")])
def test_every_vector_in_words_and_as_json(row, capsys):
    assert main(["decode", "--hex", row["hex"]]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    first, *lines = captured.out.splitlines()
    assert first.split(",")[0].endswith(row["message"])
    assert first.endswith(f"{len(row['hex']) // 2} bytes")
    assert all(line.startswith("  ") and line == line.rstrip() for line in lines)
    assert main(["decode", "--hex", row["hex"], "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["message"] == row["message"]
    assert len(report["fields"]) == len(lines)
    assert all(set(one) == {"field", "value", "words"} for one in report["fields"])


def test_a_decline_says_what_it_means_and_what_to_do(capsys):
    decline = "e2d4c3d904001c101234020000000001" + "03030000" + "00000000" + "e2d4c3d9"
    assert main(["decode", "--hex", decline]) == 0
    out = capsys.readouterr().out
    assert out.startswith("CLC Decline, 28 bytes\n")
    assert "NO_DEVICE" in out


@pytest.mark.parametrize(
    "text", [CDC, CDC.upper(), "0x" + CDC, CDC[:8] + " " + CDC[8:], ":".join(
        CDC[i : i + 2] for i in range(0, len(CDC), 2)
    )]
)  # fmt: skip
def test_the_ways_of_writing_hex(text, capsys):
    assert main(["decode", "--hex", text]) == 0
    assert capsys.readouterr().out.startswith("CDC CdcMessage, 44 bytes\n")


def test_from_standard_input(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{CDC[:40]}\n{CDC[40:]}\n"))
    assert main(["decode", "--hex", "-"]) == 0
    assert capsys.readouterr().out.startswith("CDC CdcMessage, 44 bytes\n")


@pytest.mark.parametrize(
    "text", ["zz", "abc", "fe 2", "12 34 5g", "\N{DIGIT ONE}\u0661"]
)
def test_what_is_no_hex_is_a_mistake(text, capsys):
    assert main(["decode", "--hex", text]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "pysmc decode: --hex wants pairs of the digits 0-9, a-f\n"


def test_too_much_is_a_mistake(capsys):
    assert main(["decode", "--hex", "00" * 65_537]) == 2
    assert capsys.readouterr().err == "pysmc decode: more than 65536 bytes\n"


@pytest.mark.parametrize(
    "text", ["", "00", "e2d4c3d9", CDC[:-2], CDC + "00", "ff" * 44]
)
def test_what_is_no_message_says_why(text, capsys):
    assert main(["decode", "--hex", text]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("no SMC-R message: ")
    assert main(["decode", "--hex", text, "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["plane"], captured.err) == (None, "")
    assert len(report["error"]) > 10
