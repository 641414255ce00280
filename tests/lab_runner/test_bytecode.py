"""Bytecode for the guest: of the newest source, whatever the host keeps itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab import bytecode, initramfs, pack

TEST = """
def test_one():
    assert 1
"""


@pytest.fixture
def tree(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a small checkout."""
    root = tmp_path / "checkout"
    (root / "pysmc").mkdir(parents=True)
    (root / "pysmc" / "one.py").write_text("x = 1\n")
    (root / "test_one.py").write_text(TEST)
    (root / "pytest.ini").write_text("[pytest]\n")
    for module in (bytecode, pack):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(pack, "TREE", ("pysmc", "test_one.py"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return root


def unpack(path: Path, to: Path) -> None:
    """Unpack as the guest does."""
    with path.open("rb") as file:
        command = ["busybox", "cpio", "-idm"]
        subprocess.run(command, stdin=file, cwd=to, check=True, capture_output=True)


@pytest.mark.skipif(
    shutil.which("busybox") is None,
    reason="needs the program busybox: apt-get install -y busybox-static",
)
@pytest.mark.slow
def test_python_in_the_guest_finds_it_beside_its_source(
    tree: Path, tmp_path: Path
) -> None:
    bytecode.rewrite(["test_one.py"])
    share = tmp_path / "share"
    share.mkdir()
    with (share / "archive").open("wb") as file:
        initramfs.write(file, initramfs.checkout())
    assert not list(tree.rglob("__pycache__")), "the checkout is left alone"
    unpack(share / "archive", share)
    found = share / "pack" / tree.relative_to("/")
    source = found / "pysmc" / "one.py"
    compiled = Path(importlib.util.cache_from_source(str(source)))
    data = compiled.read_bytes()
    facts = source.stat()
    # PEP 552: after the magic number and the flags, the source's time and size.
    assert data[4:8] == bytes(4)
    assert int.from_bytes(data[8:12], "little") == int(facts.st_mtime)
    assert int.from_bytes(data[12:16], "little") == facts.st_size
    assert list((found / "__pycache__").glob(f"test_one.{pack.TAG}-pytest-*.pyc"))


@pytest.mark.slow
def test_only_what_has_changed_is_rewritten(tree: Path, monkeypatch) -> None:
    bytecode.rewrite(["test_one.py"])
    ran: list[list[str]] = []
    monkeypatch.setattr(bytecode, "_run", ran.append)
    bytecode.rewrite(["test_one.py"])
    assert ran == []
    later = (tree / "test_one.py").stat().st_mtime + 1000
    os.utime(tree / "test_one.py", (later, later))
    bytecode.rewrite(["test_one.py"])
    assert len(ran) == 1
    assert "--collect-only" in ran[0]


def test_another_pythons_is_not_taken(tree: Path) -> None:
    place = bytecode.folder() / (tree / "pysmc").relative_to("/")
    place.mkdir(parents=True)
    (place / "one.cpython-37.pyc").touch()
    (place / f"one.{sys.implementation.cache_tag}.opt-1.pyc").touch()
    (place / f"one.{sys.implementation.cache_tag}.pyc").touch()
    (place / f"gone.{sys.implementation.cache_tag}.pyc").touch()
    found = [path.name for _, path in bytecode.of_tree(pack.tree())]
    assert found == [f"one.{sys.implementation.cache_tag}.pyc"]
