"""The way to a peer: this host's own routes, and a device that is faked beside lo."""

from __future__ import annotations

import socket

import pytest

from pysmc.cli.checks import verbs_peer

GID = (("::ffff:127.0.0.1", "RoCE v2"),)


def look(machine, files, peer, **environ):
    return verbs_peer.peer.look(machine(files, peer=peer, environ=environ))


def test_nobody_was_named(machine):
    finding = look(machine, {}, "")
    assert finding.status == "skip"
    assert "--peer HOST" in finding.seen


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "localhost"])
def test_over_the_device_of_the_route(host, machine, rxe):
    finding = look(machine, rxe("rxe7", "lo", gids=GID), host)
    if "::1" in finding.seen:
        pytest.skip("localhost is ::1 here")
    assert finding.status == "ok"
    assert finding.seen.startswith("From 127.0.0.1 to 127.0.0.")
    assert "rxe7:1:0, GID 127.0.0.1 on lo; the way to 127.0.0." in finding.seen


def test_a_device_beside_another_network_device(machine, rxe):
    finding = look(machine, rxe("rxe7", "va", gids=GID), "127.0.0.1")
    assert finding.status == "fail"
    assert "network device lo carries the connection, but no RDMA" in finding.seen


def test_the_configured_device(machine, rxe):
    files = rxe("rxe7", "lo", gids=GID)
    finding = look(machine, files, "127.0.0.1", PYSMC_RDMA_DEVICE="rxe7:1:0")
    assert finding.status == "ok"
    finding = look(machine, files, "127.0.0.1", PYSMC_RDMA_DEVICE="rxe9")
    assert finding.status == "fail"
    assert "rdma_device rxe9 is not there" in finding.seen


def test_no_such_host(machine, rxe):
    finding = look(machine, rxe(), "no such host")
    assert finding.status == "fail"
    assert finding.seen.startswith("no such host: ")


class Silent:
    """Has no answer for anybody."""

    answers: list[tuple[int, bool, str]] = []  # noqa: RUF012
    open = 0

    def __init__(self):
        type(self).open += 1
        self.end, self.other = socket.socketpair()

    def fileno(self):
        return self.end.fileno()

    def begin(self, key, gid, port):
        assert gid == bytes(10) + b"\xff\xff\x7f\0\0\x01"

    def poll(self):
        return self.answers

    def close(self):
        type(self).open -= 1
        self.end.close()
        self.other.close()


def test_a_peer_that_is_not_there(machine, rxe, monkeypatch):
    class Gone(Silent):
        answers = [(1, False, "127.0.0.1 does not answer on lo")]  # noqa: RUF012

    monkeypatch.setattr("pysmc.fabric.verbs_reach.Reach", Gone)
    finding = look(machine, rxe("rxe7", "lo", gids=GID), "127.0.0.1")
    assert finding.status == "fail"
    assert finding.seen.endswith("; but 127.0.0.1 does not answer on lo.")
    assert Gone.open == 0


def test_no_answer_in_time(machine, rxe, monkeypatch):
    monkeypatch.setattr("pysmc.fabric.verbs_reach.Reach", Silent)
    monkeypatch.setattr(verbs_peer, "DEADLINE", 0.01)
    finding = look(machine, rxe("rxe7", "lo", gids=GID), "127.0.0.1")
    assert finding.status == "fail"
    assert "not found within 0.01 s" in finding.seen
    assert Silent.open == 0
