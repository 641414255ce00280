"""What the guest's kernel boots with: busybox, a few modules, and `guest/init`.

The archive is in cpio's format "newc" (kernel: early-userspace/buffer-format.rst). It is
written here, for it holds folders and files only.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from lab.places import HERE, cache

if TYPE_CHECKING:
    from lab.kernel import Kernel

BOOT_MODULES = ("virtio_pci", "virtio-rng", "9pnet_virtio", "9p", "overlay")
"""Loaded before there is a root; the others are found there."""
FOLDERS = ("bin", "dev", "proc", "sys", "lower", "upper", "root", "modules")


def build(kernel: Kernel) -> Path:
    """Give the archive for a kernel; make it when its parts have changed."""
    parts = _parts(kernel)
    digest = hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]
    path = cache() / f"initramfs-{kernel.version}-{digest}.gz"
    if not path.exists():
        for old in cache().glob(f"initramfs-{kernel.version}-*.gz"):
            old.unlink(missing_ok=True)
        fresh = path.with_suffix(".part")
        fresh.write_bytes(gzip.compress(archive(parts), compresslevel=1))
        fresh.rename(path)
    return path


def _parts(kernel: Kernel) -> dict[str, tuple[int, bytes]]:
    """Name -> mode and content; a folder has none."""
    busybox = shutil.which("busybox")
    assert busybox is not None, "lab.needs tells"
    parts = dict.fromkeys(FOLDERS, (stat.S_IFDIR | 0o755, b""))
    parts["bin/busybox"] = (stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    parts["init"] = (stat.S_IFREG | 0o755, (HERE / "guest" / "init").read_bytes())
    names = []
    for path in kernel.load_order(*BOOT_MODULES):
        names.append(path.name)
        parts[f"modules/{path.name}"] = (stat.S_IFREG | 0o644, path.read_bytes())
    parts["modules/order"] = (stat.S_IFREG | 0o644, "\n".join(names).encode() + b"\n")
    return parts


def archive(parts: dict[str, tuple[int, bytes]]) -> bytes:
    """Write an archive.

    Args:
        parts: Name -> mode and content; folders before what is in them.
    """
    blocks = [
        _entry(number, name, mode, data)
        for number, (name, (mode, data)) in enumerate(parts.items(), start=1)
    ]
    blocks.append(_entry(0, "TRAILER!!!", 0, b""))
    return b"".join(blocks)


def _entry(inode: int, name: str, mode: int, data: bytes) -> bytes:
    # Inode, mode, uid, gid, links, time, size, two devices of two numbers, length of
    # the name with its zero byte, checksum (none in this format).
    words = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % word for word in words)
    return _to_four(header + name.encode() + b"\0") + _to_four(data)


def _to_four(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
