"""How many may shake hands, and what is said of those who may not."""

from __future__ import annotations

import logging

import pytest

from pysmc.aio import admission as admission_module
from pysmc.aio.admission import Admission
from pysmc.config import Config

CONFIG = Config(max_handshakes=3, max_handshakes_per_peer=2)


def test_what_lasts_is_counted() -> None:
    admission = Admission(CONFIG)
    with admission.negotiating(), admission.negotiating("10.0.0.1"):
        assert len(admission) == 2
        assert admission.has_room()
        with admission.negotiating():
            assert not admission.has_room()
            assert admission.exceeded() is None
            assert admission.may_refuse()
            with admission.negotiating():
                assert admission.exceeded() == "max_handshakes"
                assert admission.exceeded(times=2) is None
    assert len(admission) == 0
    assert admission.has_room()


def test_as_many_again_are_refused_in_words() -> None:
    admission = Admission(Config(max_handshakes=1))
    with admission.negotiating():
        assert admission.may_refuse()
        with admission.negotiating():
            assert not admission.may_refuse()


@pytest.mark.parametrize(
    ("host", "is_counted"),
    [("192.0.2.1", True), ("2001:db8::1", True), ("127.0.0.1", False), ("::1", False)],
)
def test_another_host_has_its_own_limit(host: str, is_counted: bool) -> None:
    admission = Admission(CONFIG)
    with admission.negotiating(host), admission.negotiating(host):
        assert admission.exceeded(host) is None
        with admission.negotiating(host):
            over = "max_handshakes_per_peer" if is_counted else None
            assert admission.exceeded(host) == over
            assert admission.exceeded("192.0.2.2") is None
            assert admission.exceeded() is None
    assert admission.exceeded(host) is None


def test_an_address_that_is_none_is_of_nobody_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission_module, "is_local", lambda _: True)
    admission = Admission(CONFIG)
    with (
        admission.negotiating("?"),
        admission.negotiating("?"),
        admission.negotiating("?"),
    ):
        assert admission.exceeded("?") == "max_handshakes_per_peer"


def test_each_kind_is_logged_once_and_counted_always(
    caplog: pytest.LogCaptureFixture,
) -> None:
    admission = Admission(CONFIG)
    with caplog.at_level(logging.WARNING, "pysmc"):
        reasons = [admission.over("max_handshakes") for _ in range(5)]
        admission.over("max_handshakes_per_peer")
    assert {reason.name for reason in reasons} == {"LIMIT"}
    assert "max_handshakes is 3." in reasons[0].text
    assert admission.excess == {"max_handshakes": 5, "max_handshakes_per_peer": 1}
    assert [record.args for record in caplog.records] == [
        ("max_handshakes", 3),
        ("max_handshakes_per_peer", 2),
    ]
