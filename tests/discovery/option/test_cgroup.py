"""Mounts and memberships as /proc shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pysmc.discovery.option.cgroup import NoCgroupError, mount_point, own_cgroup

UNIFIED = "37 25 0:34 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
HYBRID = (
    "30 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n"
    "31 30 0:27 / /sys/fs/cgroup/cpu rw shared:10 master:3 - cgroup cgroup rw,cpu\n"
    "32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n"
)
NONE = "24 1 8:1 / / rw - ext4 /dev/cgroup2 rw\n"


@pytest.fixture
def proc(tmp_path):
    def write(mountinfo=UNIFIED, cgroup="0::/\n"):
        (tmp_path / "mountinfo").write_text(mountinfo)
        (tmp_path / "cgroup").write_text(cgroup)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("mountinfo", "expected"),
    [
        (UNIFIED, "/sys/fs/cgroup"),
        (HYBRID, "/sys/fs/cgroup/unified"),
        # A part of the tree is mounted too, say for a container.
        (
            "40 1 0:34 /box /box/cgroup rw - cgroup2 none rw\n" + UNIFIED,
            "/sys/fs/cgroup",
        ),
        ("40 1 0:34 /box /box/cgroup rw - cgroup2 none rw\n", "/box/cgroup"),
        (r"40 1 0:34 / /a\040b\134c rw - cgroup2 none rw" + "\n", "/a b\\c"),
    ],
)
def test_where_it_is_mounted(proc, mountinfo, expected):
    assert mount_point(proc(mountinfo)) == Path(expected)


def test_not_mounted(proc, tmp_path):
    with pytest.raises(NoCgroupError, match="hybrid"):
        mount_point(proc(NONE))
    with pytest.raises(NoCgroupError, match="mountinfo cannot be read"):
        mount_point(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        ("0::/\n", "/sys/fs/cgroup"),
        ("4:memory:/x\n0::/a.slice/b.service\n", "/sys/fs/cgroup/a.slice/b.service"),
        ("0::/../other\n", "/sys/fs/cgroup/../other"),
    ],
)  # fmt: skip
def test_the_own_cgroup(proc, cgroup, expected):
    assert own_cgroup(proc(cgroup=cgroup)) == Path(expected)


def test_in_no_cgroup(proc, tmp_path):
    with pytest.raises(NoCgroupError, match="0::"):
        own_cgroup(proc(cgroup="4:memory:/x\n"))
    with pytest.raises(NoCgroupError, match="cannot be read"):
        own_cgroup(tmp_path / "nowhere")
