"""What the guest's kernel boots with: busybox, modules, `guest/init`, and the pack.

The archive is in cpio's format "newc" (kernel: early-userspace/buffer-format.rst),
written here, for it holds folders, files and links only.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lab import bytecode, pack
from lab.errors import LabMissing
from lab.places import HERE, cache

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lab.kernel import Kernel

BOOT_MODULES = (
    "virtio_pci", "virtio-rng", "9pnet_virtio", "9p", "overlay",
    "crc32_generic", "crc32c_generic", "veth", "rdma_rxe", "ib_uverbs",
)  # fmt: skip
"""What every guest uses; modprobe finds the others in the cached kernel."""
FOLDERS = (
    "bin",
    "dev",
    "proc",
    "sys",
    "lower",
    "upper",
    "whole",
    "modules",
    "pack",
    "share",
)
FORMAT = 1
"""Changes with what an archive looks like, so that no old one is taken."""


@dataclass(frozen=True, slots=True)
class Part:
    """One entry of the archive."""

    name: str
    """Without a leading slash."""
    mode: int
    data: bytes = b""
    """Of a file that is made here; the target of a link."""
    source: Path | None = None
    """Where a file's bytes are; changed files give another archive."""
    mtime: int = 0
    """In seconds: bytecode is taken only when this is its source's."""
    size: int = 0
    """Of the source, in bytes."""

    @property
    def key(self) -> str:
        """What makes two parts the same."""
        own = hashlib.sha256(self.data).hexdigest() if self.data else ""
        return f"{self.name} {self.mode} {self.mtime} {self.size} {own}"


END = Part("TRAILER!!!", 0)
HEADER_BYTES = 110
"""Before the name of an entry."""


def build(kernel: Kernel) -> Path:
    """Give the archive for a kernel, with the checkout as it is now at its end.

    What is before that changes seldom, and is written when one of its parts has
    changed. The kernel unpacks archives that follow each other, and much faster than a
    program of the guest could.
    """
    parts = [*_own(kernel), *packed(pack.installed())]
    text = "\n".join([str(FORMAT), *(part.key for part in parts)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache() / f"initramfs-{kernel.version}-{digest}"
    if not path.exists():
        for old in cache().glob(f"initramfs-{kernel.series}.*"):
            old.unlink(missing_ok=True)
        fresh = path.with_name("initramfs-part")
        with fresh.open("wb") as file:
            write(file, parts)
        fresh.rename(path)
    with path.open("r+b") as file:
        file.truncate(file.seek(length(parts)))
        write(file, checkout())
    return path


def checkout() -> Iterator[Part]:
    """Make the parts that change too often to be in what is kept."""
    bytecode.compile_tree()
    sources = pack.tree()
    yield from packed(sources)
    yield from _bytecode(sources)


def _bytecode(sources: Iterable[Path]) -> Iterator[Part]:
    seen: set[Path] = set()
    for place, path in bytecode.of_tree(sources):
        if place.parent not in seen:
            seen.add(place.parent)
            yield Part(f"pack{place.parent}", stat.S_IFDIR | 0o755)
        yield Part(f"pack{place}", stat.S_IFREG | 0o644, source=path)


def _own(kernel: Kernel) -> Iterator[Part]:
    busybox = shutil.which("busybox")
    if busybox is None:
        text = "there is no busybox: apt-get install -y busybox-static"
        raise LabMissing(text)
    for name in FOLDERS:
        yield Part(name, stat.S_IFDIR | 0o755)
    yield Part("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    yield Part("init", stat.S_IFREG | 0o755, (HERE / "guest" / "init").read_bytes())
    order = []
    for path in kernel.load_order(*BOOT_MODULES):
        name = path.name.removesuffix(".xz")
        data = path.read_bytes()
        if name != path.name:
            data = lzma.decompress(data)
        order.append(f"{name}\n")
        yield Part(f"modules/{name}", stat.S_IFREG | 0o644, data)
    yield Part("modules/order", stat.S_IFREG | 0o644, "".join(order).encode())


def packed(paths: Iterable[Path]) -> Iterator[Part]:
    """Make the parts of a pack: the files, below folders like the host's.

    Args:
        paths: Absolute, without links in their folders.
    """
    seen: set[Path] = set()
    for path in sorted(paths):
        for folder in (*reversed(path.parents), path):
            if folder in seen:
                continue
            seen.add(folder)
            facts = folder.lstat()
            name = f"pack{folder}".rstrip("/")
            if stat.S_ISDIR(facts.st_mode):
                yield Part(name, facts.st_mode)
            elif stat.S_ISLNK(facts.st_mode):
                yield Part(name, facts.st_mode, os.fsencode(folder.readlink()))
            else:
                mtime, size = int(facts.st_mtime), facts.st_size
                yield Part(name, facts.st_mode, b"", folder, mtime, size)


def write(file: IO[bytes], parts: Iterable[Part]) -> None:
    """Write an archive.

    Args:
        file: To write to.
        parts: Its entries; folders before what is in them.
    """
    number = 0
    for number, part in enumerate(parts, start=1):
        data = part.data if part.source is None else part.source.read_bytes()
        file.write(_entry(number, part, data))
    file.write(_entry(number + 1, END, b""))


def length(parts: Iterable[Part]) -> int:
    """Compute the length of an archive, in bytes."""
    sizes = (len(part.data) if part.source is None else part.size for part in parts)
    names = (len(part.name.encode()) for part in [*parts, END])
    whole = sum(-(-size // 4) * 4 for size in sizes)
    return whole + sum(-(-(HEADER_BYTES + name + 1) // 4) * 4 for name in names)


def _entry(inode: int, part: Part, data: bytes) -> bytes:
    name = part.name.encode()
    # Inode, mode, uid, gid, links, time, size, two devices of two numbers, length of
    # the name with its zero byte, checksum (none in this format).
    words = [inode, part.mode, 0, 0, 1, part.mtime, len(data), 0, 0, 0, 0]
    words += [len(name) + 1, 0]
    header = b"070701" + b"".join(b"%08X" % word for word in words)
    return _to_four(header + name + b"\0") + _to_four(data)


def _to_four(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
