"""Which kernel the lab takes, and when it asks for one."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from lab import kernel
from lab.errors import LabMissing, NotOffered

if TYPE_CHECKING:
    from pathlib import Path

BOOKWORM = [
    "linux-image-6.12.9+deb12-amd64",
    "linux-image-6.12.107+deb12-amd64",
    "linux-image-6.12.117+deb12-amd64-unsigned",
    "linux-image-6.12.117+deb12-amd64",
    "linux-image-6.12.118+deb12-cloud-amd64",
    "linux-image-6.12.118+deb12-rt-amd64",
    "linux-image-6.12.118+deb12-amd64-dbg",
    "linux-image-6.12.118+deb12-arm64",
    "linux-image-6.1.0-40-amd64",
    "linux-image-6.1.0-9-amd64",
    "linux-image-6.1.0-41-amd64-unsigned",
    "linux-image-6.1.0-42-cloud-amd64",
    "linux-image-6.1.0-42-rt-amd64",
]


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (BOOKWORM, "linux-image-6.12.117+deb12-amd64"),
        (
            ["linux-image-6.12.48+deb13-amd64", "linux-image-6.12.43+deb13-amd64"],
            "linux-image-6.12.48+deb13-amd64",
        ),
        (
            ["linux-image-6.12.48+deb13-amd64", "linux-image-6.12.48+deb12-amd64"],
            "linux-image-6.12.48+deb13-amd64",
        ),
        (
            ["linux-image-6.12.5+deb12-amd64-unsigned"],
            "linux-image-6.12.5+deb12-amd64-unsigned",
        ),
        (["linux-image-6.1.0-40-amd64", "linux-image-6.12-amd64"], None),
        ([], None),
    ],
)
def test_the_newest_of_the_right_kind_is_chosen(
    offered: list[str], chosen: str | None
) -> None:
    assert kernel.choose(offered) == chosen
    assert kernel.choose(reversed(offered)) == chosen


def test_each_series_has_packages_of_its_own() -> None:
    assert kernel.choose(BOOKWORM, "6.1") == "linux-image-6.1.0-41-amd64-unsigned"
    assert kernel.choose(BOOKWORM[:9], "6.1") == "linux-image-6.1.0-40-amd64"


def put_kernel(cache: Path, version: str, *, is_complete: bool = True) -> None:
    folder = cache / "kernels" / version
    folder.mkdir(parents=True)
    if is_complete:
        (folder / "complete").touch()


class Commands:
    """Plays the programs; what is not told is a surprise."""

    def __init__(self, **answers: tuple[int, str]) -> None:
        self.answers = answers
        self.ran: list[str] = []

    def __call__(
        self, command: list[str], cwd: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        line = " ".join(command)
        self.ran.append(line)
        for word, (code, text) in self.answers.items():
            if word in line:
                out, err = ("", text) if code else (text, "")
                return subprocess.CompletedProcess(command, code, out, err)
        raise AssertionError(line)


def test_nothing_is_asked_for_when_a_kernel_is_there(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_kernel(cache, "6.12.9+deb12-amd64")
    put_kernel(cache, "6.12.107+deb12-amd64")
    put_kernel(cache, "6.12.117+deb12-amd64", is_complete=False)
    put_kernel(cache, "6.1.0-9-amd64")
    put_kernel(cache, "6.1.0-40-amd64")
    monkeypatch.setattr(kernel, "_run", Commands())
    assert kernel.get().version == "6.12.107+deb12-amd64"
    found = kernel.get("6.1")
    assert (found.version, found.series) == ("6.1.0-40-amd64", "6.1")


def test_the_index_is_fetched_without_privilege_where_it_is_empty(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(pkgnames=(0, ""), update=(0, ""))
    monkeypatch.setattr(kernel, "_run", commands)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(LabMissing, match=r"no linux-image-6\.12") as told:
        kernel.get()
    assert not isinstance(told.value, NotOffered), "the usual one has to be there"
    asked, updated, again = commands.ran
    assert "Dir::State" not in asked
    assert f"Dir::State::lists={cache}" in updated
    assert f"Dir::State::lists={cache}" in again


@pytest.mark.parametrize(
    ("release", "kind"),
    [
        ({"ID": "debian", "VERSION_ID": "12"}, LabMissing),
        ({"ID": "debian", "VERSION_ID": "13"}, NotOffered),
        ({"ID": "debian"}, NotOffered),
        ({"ID": "ubuntu", "VERSION_ID": "12"}, NotOffered),
        (None, NotOffered),
    ],
)
def test_a_kernel_that_a_distribution_never_had_is_told_from_one_that_is_lost(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    release: dict[str, str] | None,
    kind: type[LabMissing],
) -> None:
    def here() -> dict[str, str]:
        if release is None:
            raise FileNotFoundError
        return release

    monkeypatch.setattr("platform.freedesktop_os_release", here)
    monkeypatch.setattr(kernel, "_run", Commands(pkgnames=(0, ""), update=(0, "")))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(
        LabMissing, match=r"no linux-image-6\.1\..* of Debian 12;"
    ) as told:
        kernel.get("6.1")
    assert type(told.value) is kind


def test_a_download_that_fails_says_which(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = (0, "\n".join(BOOKWORM))
    commands = Commands(pkgnames=offered, download=(100, "E: no network"))
    monkeypatch.setattr(kernel, "_run", commands)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(LabMissing, match=r"6\.12\.117\+deb12-amd64' failed: E: no net"):
        kernel.get()
    assert list(cache.iterdir()) == [], "nothing half is left"


def test_other_systems_are_told_how_to_name_a_package(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(LabMissing, match="PYSMC_LAB_KERNEL may name"):
        kernel.get()
    with pytest.raises(LabMissing, match="PYSMC_LAB_KERNEL_6_1 may name"):
        kernel.get("6.1")


@pytest.mark.parametrize("text", [None, "no package"])
def test_a_named_package_has_to_be_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    path = tmp_path / "kernel.deb"
    monkeypatch.setenv("PYSMC_LAB_KERNEL", str(path))
    words = "there is no kernel package"
    if text is not None:
        path.write_text(text)
        words = "is no kernel package"
    with pytest.raises(LabMissing, match=words):
        kernel.get()


def test_modules_are_listed_after_those_that_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        "9p": (0, "insmod /m/netfs.ko.xz \ninsmod /m/9p.ko.xz \nbuiltin virtio\n"),
        "rdma_rxe": (0, "insmod /m/netfs.ko.xz \ninsmod /m/rdma_rxe.ko.xz \n"),
    }
    monkeypatch.setattr(kernel, "_run", Commands(**answers))
    found = kernel.Kernel(tmp_path, "6.12.1").load_order("9p", "rdma_rxe")
    assert [path.name for path in found] == [
        "netfs.ko.xz",
        "9p.ko.xz",
        "rdma_rxe.ko.xz",
    ]
    monkeypatch.setattr(kernel, "_run", Commands(veth=(1, "not found")))
    with pytest.raises(LabMissing, match=r"kernel 6\.12\.1 has no module veth: not"):
        kernel.Kernel(tmp_path, "6.12.1").load_order("veth")
