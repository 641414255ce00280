"""Finding pyverbs, loading it, and opening a device with it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

import pytest

from pysmc.errors import FabricUnavailable
from pysmc.fabric import verbs_binding, verbs_loading
from pysmc.fabric.verbs_binding import open_verbs
from pysmc.fabric.verbs_loading import find_pyverbs

MINE = importlib.machinery.EXTENSION_SUFFIXES[0].split(".")[1]

pytestmark = pytest.mark.usefixtures("forget")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty machine; gives where a distribution would put pyverbs."""
    for name in [name for name in sys.modules if name.split(".")[0] == "pyverbs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(verbs_loading, "PLACES", (str(tmp_path / "python{0}.{1}"),))
    place = tmp_path / "python{}.{}".format(*sys.version_info)
    place.mkdir()
    return place


def install(place: Path, **files: str) -> Path:
    """Put a package there; each module does nothing unless its text is given."""
    package = place / "pyverbs"
    package.mkdir()
    for name in ("__init__", *verbs_loading._MODULES):
        (package / f"{name}.py").write_text(files.get(name, ""))
    return package


def test_it_may_be_nowhere(place: Path) -> None:
    found = find_pyverbs()
    assert found.path == found.version == ""
    assert found.interpreter == MINE
    assert found.problem.startswith("python3-pyverbs is not installed")
    assert str(place) in found.problem
    with pytest.raises(FabricUnavailable, match="python3-pyverbs is not installed"):
        open_verbs("rxe0")


def test_it_is_taken_from_the_distribution_alone(place: Path) -> None:
    """Nothing else that lies there comes onto the path."""
    package = install(place)
    (place / "beside.py").write_text("")
    found = find_pyverbs()
    assert (found.path, found.problem) == (str(package), "")
    assert sys.modules["pyverbs.device"].__file__ == str(package / "device.py")
    assert str(place) not in sys.path
    with pytest.raises(ImportError):
        importlib.import_module("beside")
    assert find_pyverbs() == found  # it is loaded by now


def test_it_may_be_built_for_another_python(place: Path) -> None:
    package = install(place)
    other = package / "device.cpython-39-arm-linux-gnu.so"
    other.write_bytes(b"\x7fELF...IBVERBS_PRIVATE_44\0")
    found = find_pyverbs()
    expected = (
        f"pyverbs is built for cpython-39-arm-linux-gnu, and this Python is {MINE}"
    )
    assert found.problem == expected
    assert "pyverbs" not in sys.modules


def test_what_cannot_be_loaded_says_so(place: Path) -> None:
    package = install(place)
    (package / f"device.{MINE}.so").write_bytes(b"no library")
    found = find_pyverbs()
    assert found.problem.startswith("pyverbs cannot be loaded: ")
    assert found.version == ""


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (
            "libibverbs.so.1: version `IBVERBS_PRIVATE_59' not found",
            (
                "pyverbs wants another libibverbs than the installed one"
                " (IBVERBS_PRIVATE_59)"
            ),
        ),
        (
            "libibverbs.so.1: cannot open shared object file",
            "pyverbs needs libibverbs, which is not installed",
        ),
    ],
)
def test_the_library_below_may_be_missing(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: str, problem: str
) -> None:
    package = install(place, cq=f"raise ImportError({error!r})")
    extension = package / f"device.{MINE}.so"
    extension.write_bytes(b"\x7fELF...IBVERBS_PRIVATE_59\0")
    # It is no extension that this Python could load, and its turn comes first.
    monkeypatch.setattr(verbs_loading, "_MODULES", ("cq",))
    assert find_pyverbs().problem == problem


def test_the_module_path_comes_first(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(place)
    mine = tmp_path / "mine"
    mine.mkdir()
    package = install(mine)
    spec = importlib.machinery.ModuleSpec(
        "pyverbs", None, origin=f"{package}/__init__.py"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)
    assert find_pyverbs().path == str(package)


def test_the_librarys_file_tells_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = (
        "7f00-7f01 r-xp 0 fe:00 1 /usr/lib/x86_64-linux-gnu/libibverbs.so.1.14.44.0\n"
        "7f01-7f02 r-xp 0 fe:00 2 /usr/lib/x86_64-linux-gnu/libc.so.6\n"
    )
    for text, version in ((maps, "44.0"), ("", "")):
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text, **__: text)
        assert verbs_loading._loaded_version() == version


def test_without_proc_no_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", no_proc)
    assert verbs_loading._loaded_version() == ""


def test_a_device_that_cannot_be_opened(place: Path) -> None:
    error = "class PyverbsError(Exception):\n    error_code = 13\n"
    device = (
        "from pyverbs.pyverbs_error import PyverbsError\n"
        "def Context(name):\n    raise PyverbsError(name)\n"
    )
    install(place, device=device, pyverbs_error=error)
    with pytest.raises(
        FabricUnavailable, match="RDMA device rxe0 cannot be opened"
    ) as e:
        open_verbs("rxe0")
    assert "EACCES" in e.value.detail


def test_a_file_that_may_not_be_used_is_named(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libibverbs leaves such a device out of its list, as if there were none."""
    error = "class PyverbsError(Exception):\n    error_code = 2\n"
    device = (
        "from pyverbs.pyverbs_error import PyverbsError\n"
        "def Context(name):\n    raise PyverbsError(name)\n"
    )
    install(place, device=device, pyverbs_error=error)
    verbs, nodes = tmp_path / "verbs", tmp_path / "nodes"
    nodes.mkdir()
    for number, name in enumerate(("rxe0", "rxe1", "rxe2")):
        (verbs / f"uverbs{number}").mkdir(parents=True)
        (verbs / f"uverbs{number}" / "ibdev").write_text(f"{name}\n")
    (verbs / "uverbs9").mkdir()  # is just going away
    for number in (0, 1):
        (nodes / f"uverbs{number}").touch()
    monkeypatch.setattr(verbs_binding, "VERBS", str(verbs))
    monkeypatch.setattr(verbs_binding, "NODES", str(nodes))
    forbidden = str(nodes / "uverbs1")
    monkeypatch.setattr(os, "access", lambda node, mode: node != forbidden)
    for name, words in {
        "rxe0": "ENOENT",
        "rxe1": f"no permission for {forbidden}",
        "rxe2": "ENOENT",
    }.items():
        with pytest.raises(FabricUnavailable) as e:
            open_verbs(name)
        assert words in e.value.detail
