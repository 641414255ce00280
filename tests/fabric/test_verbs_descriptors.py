"""Which descriptor something opened, whatever other threads do meanwhile."""

from __future__ import annotations

import os

import pytest

from pysmc.fabric.verbs_api import VerbsError
from pysmc.fabric.verbs_descriptors import NewDescriptors, with_descriptor
from tests.fabric.fake_pyverbs import new_descriptor


def test_a_child_can_open_devices_whatever_another_thread_did() -> None:
    lock = NewDescriptors.lock
    with lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if not NewDescriptors.lock.locked() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert NewDescriptors.lock is lock


def test_what_another_thread_opens_is_not_taken_for_ours() -> None:
    with NewDescriptors() as new:
        opened = [new_descriptor() for _ in range(2)]
    with pytest.raises(VerbsError, match="find one infinibandevent among"):
        new.only("infinibandevent")
    for fd in opened:
        os.close(fd)


def test_a_number_that_another_thread_gave_up_is_tried_again() -> None:
    others = [new_descriptor()]
    made: list[int] = []

    class Channel:
        def __init__(self) -> None:
            if others:  # closed between our two looks, and its number is ours now
                os.close(others.pop())
            self.fd = new_descriptor()
            made.append(self.fd)

        def close(self) -> None:
            os.close(self.fd)

    number = others[0]
    channel, fd = with_descriptor(Channel)
    assert made[0] == number
    assert len(made) == 2
    assert fd == channel.fd
    channel.close()


def test_it_is_not_tried_for_ever() -> None:
    class Two:
        closed = 0

        def __init__(self) -> None:
            self.fds = [new_descriptor() for _ in range(2)]

        def close(self) -> None:
            Two.closed += 1
            for fd in self.fds:
                os.close(fd)

    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(VerbsError, match="find one infinibandevent among"):
        with_descriptor(Two)
    assert Two.closed == 8
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_was_there_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server has thousands of descriptors, and each name is a system call."""
    read: list[str] = []
    readlink = os.readlink

    def counted(path: str) -> str:
        read.append(path)
        return readlink(path)

    there = [new_descriptor() for _ in range(50)]
    with monkeypatch.context() as patch:
        patch.setattr(os, "readlink", counted)
        with NewDescriptors() as new:
            before = len(read)
            made = new_descriptor()
    assert new.only("infinibandevent") == made
    assert before > 50
    assert len(read) - before <= 2, "the new one, and the one that lists them"
    for fd in (*there, made):
        os.close(fd)
