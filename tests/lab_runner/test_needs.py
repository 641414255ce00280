"""Where the lab can run is said in one place."""

from __future__ import annotations

import sys

import pytest

from lab import needs
from lab.errors import LabMissing


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Play a machine on which nothing is missing."""
    tag = sys.implementation.cache_tag
    (tmp_path / f"device.{tag}-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(needs, "PYVERBS", tmp_path)
    monkeypatch.setattr("shutil.which", lambda name, path: f"/bin/{name}")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")


def test_nothing_is_missing_on_a_complete_machine(complete) -> None:
    assert needs.missing() == ""
    needs.check()


def test_programs_are_named_by_their_packages(complete, monkeypatch) -> None:
    monkeypatch.setattr(
        "shutil.which", lambda name, path: None if "q" in name else name
    )
    assert (
        needs.missing() == "the lab needs programs: apt-get install -y qemu-system-x86"
    )
    with pytest.raises(LabMissing, match="qemu-system-x86"):
        needs.check()


def test_other_machines_cannot(complete, monkeypatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    assert "this is s390x" in needs.missing()


def test_pyverbs_is_wanted_for_this_very_python(
    complete, monkeypatch, tmp_path
) -> None:
    for path in tmp_path.iterdir():
        path.rename(tmp_path / "device.cpython-39-x86_64-linux-gnu.so")
    assert "a Python that pyverbs was built for" in needs.missing()
    monkeypatch.setattr(needs, "PYVERBS", tmp_path / "nowhere")
    assert "apt-get install -y python3-pyverbs" in needs.missing()


@pytest.mark.parametrize(
    ("value", "required", "off"),
    [("", False, False), ("require", True, False), ("off", False, True)],
)
def test_the_environment_decides_what_a_missing_lab_means(
    monkeypatch, value: str, required: bool, off: bool
) -> None:
    monkeypatch.setenv("PYSMC_LAB", value)
    assert (needs.is_required(), needs.is_off()) == (required, off)
