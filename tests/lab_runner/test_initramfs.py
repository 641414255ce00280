"""The archive that the guest boots with: what is in it is what the host has."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from lab import initramfs, pack
from lab.initramfs import Part, packed, write
from lab.kernel import Kernel
from lab.places import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Entry(NamedTuple):
    name: str
    mode: int
    mtime: int
    data: bytes


def read(data: bytes) -> Iterator[Entry]:
    """Read archives that follow each other, by the description of the format."""
    place = 0
    while True:
        if place == len(data):
            return
        assert data[place : place + 6] == b"070701"
        words = [
            int(data[place + 6 + 8 * n : place + 14 + 8 * n], 16) for n in range(13)
        ]
        name = data[place + 110 : place + 110 + words[11]]
        assert name.endswith(b"\0")
        place += (110 + words[11] + 3) & ~3
        content = data[place : place + words[6]]
        place += (words[6] + 3) & ~3
        if name == b"TRAILER!!!\0":
            continue
        yield Entry(name[:-1].decode(), words[1], words[5], content)


def archived(parts: Iterable[Part]) -> list[Entry]:
    file = io.BytesIO()
    write(file, parts)
    return list(read(file.getvalue()))


def test_files_links_and_folders_come_back(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir(mode=0o700)
    source = tmp_path / "deep" / "module.py"
    source.write_bytes(b"x = 1")
    os.utime(source, (1000.9, 2000.9))
    link = tmp_path / "deep" / "alias"
    link.symlink_to("module.py")
    entries = archived(packed([link, source]))
    by_name = {entry.name: entry for entry in entries}
    assert len(by_name) == len(entries)
    below = f"pack{tmp_path}/deep"
    # Bytecode counts only when its source is as old as it says.
    assert by_name[f"{below}/module.py"][2:] == (2000, b"x = 1")
    assert by_name[f"{below}/alias"].data == b"module.py"
    assert stat.S_ISLNK(by_name[f"{below}/alias"].mode)
    assert by_name[below].mode == stat.S_IFDIR | 0o700
    names = [entry.name for entry in entries]
    for name in names[1:]:
        assert name.rpartition("/")[0] in names[: names.index(name)], "a folder first"


def test_a_changed_file_is_another_part(tmp_path: Path) -> None:
    path = tmp_path / "one.py"

    def key() -> str:
        return next(packed([path])).key + list(packed([path]))[-1].key

    path.write_text("1")
    os.utime(path, (5, 5))
    first = key()
    assert key() == first
    os.utime(path, (6, 6))
    assert key() != first
    path.write_text("12")
    os.utime(path, (5, 5))
    assert key() != first
    assert Part("a", 0, b"1").key != Part("a", 0, b"2").key


def test_the_checkout_is_packed_without_what_tools_left() -> None:
    names = {str(path.relative_to(ROOT)) for path in pack.tree()}
    assert {"pysmc/__init__.py", "pyproject.toml", "tests/conftest.py"} <= names
    assert "tests/core/conftest.py" in names
    assert not [name for name in names if name.startswith(".")]


@pytest.mark.slow
def test_what_is_left_out_is_so_at_any_depth() -> None:
    found = [path.parts for path in pack.installed()]
    assert any("pygments" in parts for parts in found)
    assert not [parts for parts in found if "lexers" in parts]


def test_libraries_are_those_that_the_loader_finds(tmp_path: Path) -> None:
    found = {path.name for path in pack.libraries([Path("/bin/sh").resolve()])}
    assert any(name.startswith("libc.so") for name in found)
    assert any(name.startswith("ld-linux") for name in found)


def test_an_archive_is_kept_until_a_part_changes(
    cache: Path, tmp_path: Path, monkeypatch
) -> None:
    wanted = tmp_path / "wanted.py"
    wanted.write_text("1")
    monkeypatch.setattr(
        initramfs, "_own", lambda kernel: iter([Part("init", 0o100755)])
    )
    monkeypatch.setattr(pack, "installed", lambda: [wanted])
    source = tmp_path / "source.py"
    monkeypatch.setattr(initramfs, "checkout", lambda: packed([source]))
    source.write_text("2")
    kernel = Kernel(tmp_path, "6.12.1")
    first = initramfs.build(kernel)
    inode = first.stat().st_ino
    source.write_text("another")
    again = initramfs.build(kernel)
    assert (again, again.stat().st_ino) == (first, inode)
    data = {entry.name: entry.data for entry in read(again.read_bytes())}
    # What is kept, and behind it the checkout as it is now, once.
    below = f"pack{tmp_path}"
    assert data[f"{below}/wanted.py"] == b"1"
    assert data[f"{below}/source.py"] == b"another"
    assert again.read_bytes().count(b"source.py\0") == 1
    older = initramfs.build(Kernel(tmp_path, "6.1.0-40-amd64"))
    wanted.write_text("123")
    other = initramfs.build(kernel)
    assert other != first
    assert set(cache.iterdir()) == {other, older}, "the old one is gone"


@pytest.mark.parametrize("size", range(5))
def test_the_length_is_known_before_it_is_written(tmp_path: Path, size: int) -> None:
    source = tmp_path / ("n" * (size + 1))
    source.write_bytes(bytes(size))
    parts = [*packed([source]), Part("x" * size, 0o120777, b"y" * (5 - size))]
    file = io.BytesIO()
    write(file, parts)
    assert initramfs.length(parts) == len(file.getvalue())
