"""A lab without a guest: a cache of its own, and a program in QEMU's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an empty cache, in which no kernel is named by the environment."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PYSMC_LAB_CACHE", str(folder))
    for name in ("KERNEL", "KERNEL_6_1", "LOCK"):
        monkeypatch.delenv(f"PYSMC_LAB_{name}", raising=False)
    folder.mkdir()
    return folder


def put_program(folder: Path, name: str, text: str) -> None:
    """Write a program for the shell."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a program in QEMU's place; the writable share is $share there."""
    folder = tmp_path / "bin"

    def put(text: str) -> None:
        pattern = r"s/.*local,path=\([^,]*\),mount_tag=share.*/\1/"
        find = f"share=$(echo \"$*\" | sed '{pattern}')"
        put_program(folder, "qemu-system-x86_64", f"{find}\n{text}")

    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return put
