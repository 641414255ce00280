from __future__ import annotations

import errno
import inspect

import pytest

from pysmc import errors
from pysmc.reasons import reason


def test_the_tree_of_the_docstring_is_the_tree_of_the_code() -> None:
    drawn = [
        word
        for line in (errors.__doc__ or "").splitlines()
        for word in line.split()
        if word in vars(errors)
    ]
    assert sorted(drawn) == sorted(errors.__all__)


def test_everything_is_an_smc_error() -> None:
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.SmcError)


@pytest.mark.parametrize(
    ("error", "standard"),
    [
        (errors.ConnectionReset, ConnectionResetError),
        (errors.PeerClosed, BrokenPipeError),
        (errors.ConnectionAborted, ConnectionAbortedError),
        (errors.Declined, ConnectionError),
        (errors.FabricUnavailable, ConnectionError),
        (errors.HandshakeTimeout, TimeoutError),
        (errors.ForkedError, RuntimeError),
    ],
)
def test_code_that_was_written_for_tcp_catches_them(
    error: type[Exception], standard: type[Exception]
) -> None:
    assert issubclass(error, standard)


def test_guilt_is_never_left_open() -> None:
    with pytest.raises(TypeError, match="RemoteProtocolError"):
        errors.ProtocolError("x")


def test_a_protocol_error_names_its_section() -> None:
    error = errors.RemoteProtocolError("cursor", section="A.4", diagnosis=7)
    assert str(error) == "cursor (A.4)"
    assert (error.section, error.diagnosis) == ("A.4", 7)
    assert str(errors.LocalProtocolError("cursor")) == "cursor"


def test_declined_carries_the_reason() -> None:
    why = reason("PEER_NO_SMC", "peer")
    error = errors.Declined(why)
    assert error.reason is why
    assert "PEER_NO_SMC 03010000 (peer)" in str(error)


def test_a_fabric_error_says_what_was_tried() -> None:
    error = errors.FabricError("register memory", "ENOMEM", "64 KiB")
    assert str(error) == "register memory: ENOMEM (64 KiB)"
    assert (error.operation, error.status) == ("register memory", "ENOMEM")
    assert str(errors.FabricUnavailable("open", "shm")) == "open: shm"


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (errors.ConnectionReset, errno.ECONNRESET),
        (errors.PeerClosed, errno.EPIPE),
        (errors.ConnectionAborted, errno.ECONNABORTED),
    ],
)
def test_the_ends_of_a_connection_carry_fabric_and_code(
    kind: type[errors.ConnectionReset], number: int
) -> None:
    assert kind("gone").errno == number
    error = kind("gone", fabric="shm", diagnosis=0x02010000)
    assert (error.fabric, error.diagnosis) == ("shm", 0x02010000)
    assert str(error) == "gone"
    assert kind("gone").fabric is None


def test_every_error_is_documented() -> None:
    for name in errors.__all__:
        assert inspect.getdoc(getattr(errors, name)), name
