"""What the guest holds in memory: Python, the tree, and the programs it starts often.

Under TCG every file that is opened over 9p costs about ten milliseconds, every time,
and a start of pytest opens two thousand. So what scenarios load lies in the archive
that the guest boots with, as a layer above the host's tree; a file that is not in it is
read over 9p and only slower. Bytecode comes along as the host has it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from lab.places import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TAG = sys.implementation.cache_tag
"""Of this Python's bytecode: no other one's is packed."""
WANTED = re.compile(
    rf"\.(?:py|so(?:\.[\d.]+)?|toml|pth|typed|txt|json)$|[.]{TAG}[.]pyc$"
    r"|/[^/]+\.dist-info/"
)
LEFT_OUT = {
    "test", "distutils", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3",
    "pydoc_data", "site-packages", "pip", "setuptools", "pkg_resources", "mypy",
    "mypyc", "jedi", "IPython", "debugpy", "grpc", "uvloop", "atheris", "grimp",
    "tornado", "prompt_toolkit", "ipykernel", "zmq", "pyzmq.libs", "asyncpg",
    "redis", "asan_with_fuzzer.so", "ubsan_with_fuzzer.so",
    "ubsan_cxx_with_fuzzer.so", "lexers", "wcwidth", "ast_serialize", "librt", "rich",
    "gunicorn", "jinja2", "websockets", "jupyter_client", "coverage",
}  # fmt: skip
"""Of the standard library and of what is installed, at any depth: big, or of no use in
a guest. Each MB that is packed costs 20 ms of every boot."""
BIGGEST = 24_000_000
"""Bytes of a file: libpython, unstripped, is the biggest that is wanted."""
TREE = ("pysmc", "proto", "tests", "tools", "benchmarks", "pyproject.toml")
PROGRAMS = (
    "sh", "bash", "cat", "cp", "cut", "date", "dmesg", "env", "grep", "hostname",
    "ibv_devices", "ibv_rc_pingpong", "ip", "ln", "mkdir", "modprobe", "mount", "mv",
    "nft", "rdma", "rm", "sed", "setsid", "sleep", "stty", "tail", "tc", "tcpdump",
    "timeout", "uname",
)  # fmt: skip
VERBS = ("libibverbs*", "librdmacm*", "libnl-*")
"""Libraries that pyverbs loads, and their drivers."""


def installed() -> list[Path]:
    """List what seldom changes: existing paths without a link in their folders."""
    return _settled((*_python(), *_programs(), *_verbs()))


def tree() -> list[Path]:
    """List what is in the checkout, without bytecode."""
    paths = (path for name in TREE for path in _walk(ROOT / name))
    return _settled(path for path in paths if path.suffix != ".pyc")


def _settled(paths: Iterable[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        found[path.parent.resolve() / path.name] = None
        if path.is_symlink():
            found[path.resolve()] = None
    return [path for path in found if path.is_file() and _is_small(path)]


def _is_small(path: Path) -> bool:
    return path.stat().st_size <= BIGGEST


def _python() -> Iterator[Path]:
    prefix = Path(sys.prefix)
    yield from (prefix / "bin" / name for name in ("python", "python3", "pysmc"))
    yield prefix / "pyvenv.cfg"
    yield from Path(sys.base_prefix, "lib").glob("libpython*.so*")
    yield Path(sys.executable).resolve()
    paths = sysconfig.get_paths()
    for folder in {Path(paths["stdlib"]).resolve(), Path(paths["purelib"]).resolve()}:
        for entry in folder.iterdir():
            if entry.name not in LEFT_OUT and not entry.name.startswith("config-"):
                for path in _walk(entry):
                    if LEFT_OUT.isdisjoint(path.relative_to(entry).parts):
                        yield path


def _walk(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    for folder, names, leaves in os.walk(place):
        names[:] = [name for name in names if not name.startswith(".")]
        for leaf in leaves:
            if WANTED.search(f"{folder}/{leaf}"):
                yield Path(folder, leaf)


def _programs() -> Iterator[Path]:
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    found = [shutil.which(name, path=search) for name in PROGRAMS]
    paths = [Path(name).resolve() for name in found if name]
    yield from paths
    yield from libraries([*paths, Path(sys.executable).resolve()])
    yield Path("/etc/ld.so.cache")


def _verbs() -> Iterator[Path]:
    yield from _walk(Path("/usr/lib/python3/dist-packages/pyverbs"))
    yield from Path("/etc/libibverbs.d").glob("*")
    folder = Path("/usr/lib/x86_64-linux-gnu")
    for pattern in VERBS:
        for path in folder.glob(pattern):
            yield from _walk(path) if path.is_dir() else (path,)


def libraries(programs: Iterable[Path]) -> Iterator[Path]:
    """Name the shared libraries of programs, as the loader finds them."""
    done = subprocess.run(
        ["ldd", *map(str, programs)], capture_output=True, text=True, check=False
    )
    for name in dict.fromkeys(re.findall(r"(/\S+\.so\S*) \(0x", done.stdout)):
        yield Path(name)
