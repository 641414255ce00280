"""Listeners that show the option, and what is made of who came through them."""

from __future__ import annotations

import errno
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.config import Config
from pysmc.discovery import Discovery
from pysmc.discovery import findings as found
from pysmc.discovery.option import sockets
from pysmc.discovery.option_server import OptionServer
from pysmc.discovery.order import Way
from pysmc.discovery.presence import Presence

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def open_sockets() -> Iterator[list[socket.socket]]:
    made: list[socket.socket] = []
    yield made
    for sock in made:
        sock.close()


@pytest.fixture
def bound(open_sockets: list[socket.socket]) -> socket.socket:
    made = socket.socket()
    open_sockets.append(made)
    made.bind(("127.0.0.1", 0))
    return made


@pytest.fixture
def server() -> OptionServer:
    return OptionServer(Presence(lambda: 0.0, is_wanted=True))


def accepted(
    listener: socket.socket, kept: list[socket.socket], option: Any = None
) -> socket.socket:
    """Accept a client that shows the option, if it is given."""
    client = socket.socket()
    kept.append(client)
    if option is not None:
        assert option.opt_in(client)
    client.connect(listener.getsockname())
    conn, _ = listener.accept()
    kept.append(conn)
    return conn


def test_clients_that_show_it_and_those_that_do_not(
    option: Any, server: OptionServer, bound: Any, open_sockets: Any
) -> None:
    server.open(bound, is_able=True)
    bound.listen()
    assert server.serves
    assert server.inspect(accepted(bound, open_sockets, option)) is None
    assert server.inspect(accepted(bound, open_sockets)) is found.PEER_NO_SMC
    option.stripped = "SYN"
    conn = accepted(bound, open_sockets, option)
    assert server.inspect(conn) is found.PEER_NO_SMC
    option.cookies = True
    assert server.inspect(conn) is found.NO_SYN_KEPT
    option.cookies, option.is_complete = False, False
    assert server.inspect(conn) is found.INCOMPLETE
    option.is_here = False
    assert server.inspect(conn) is found.INCOMPLETE


def test_as_long_as_nobody_opted_in_nothing_is_asked(
    option: Any, server: OptionServer, bound: Any, open_sockets: Any
) -> None:
    bound.listen()
    conn = accepted(bound, open_sockets)
    assert server.inspect(conn) is found.TOO_LATE
    option.is_here = False
    absent = OptionServer(Presence(lambda: 0.0, is_wanted=True))
    assert absent.inspect(conn) is found.NOT_INSTALLED
    assert option.calls == ["look", "look"]


def test_a_listener_that_listens_already_is_too_late(
    option: Any, server: OptionServer, bound: Any, open_sockets: Any
) -> None:
    bound.listen()
    server.open(bound, is_able=True)
    assert server.inspect(accepted(bound, open_sockets)) is found.TOO_LATE
    assert option.calls.count("read") == 1, "only the listener was asked"
    # Beside one that was in time, its connections are told the same.
    other = socket.socket()
    open_sockets.append(other)
    other.bind(("127.0.0.1", 0))
    server.open(other, is_able=True)
    conn = accepted(bound, open_sockets, option)
    assert server.serves
    assert server.inspect(conn) is found.TOO_LATE


@pytest.mark.parametrize("is_able", [True, False])
def test_a_listener_that_another_worker_opted_in(
    option: Any, server: OptionServer, bound: Any, open_sockets: Any, is_able: bool
) -> None:
    """Its clients speak CLC here too, so they are looked at, whatever we can do."""
    option.opt_in(bound)
    bound.listen()
    server.open(bound, is_able=is_able)
    assert server.inspect(accepted(bound, open_sockets, option)) is None


def test_a_listener_of_another_cgroup(
    option: Any, server: OptionServer, bound: Any
) -> None:
    option.elsewhere.add(os.fstat(bound.fileno()).st_ino)
    server.open(bound, is_able=True)
    assert server.inspect(bound) is found.OTHER_CGROUP


def test_where_it_is_not_installed(
    option: Any, server: OptionServer, bound: Any
) -> None:
    option.is_here = False
    server.open(bound, is_able=True)
    assert server.inspect(bound) is found.NOT_INSTALLED


def test_a_connection_that_is_gone(
    option: Any, server: OptionServer, bound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.open(bound, is_able=True)

    def gone(_: Any) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(sockets, "read_state", gone)
    assert server.inspect(bound) is found.INCOMPLETE
    option.is_here = False
    server.open(bound, is_able=True)
    assert server.serves, "what has opted in before is not forgotten"


async def test_clients_get_an_answer_where_the_option_is_not_even_configured(
    kit: Any, option: Any
) -> None:
    """Somebody else opted in with the listener that was inherited."""
    for fields in ({"fabrics": ()}, {"discovery": ()}, {"discovery": ("local",)}):
        listener = kit.bound()
        option.opt_in(listener)
        listener.listen()
        discovery = Discovery(kit.loop, Config(**fields))
        kit.discoveries.append(discovery)
        discovery.opt_in(listener, is_able=False)
        conn = kit.keep(accepted(listener, kit.sockets, option))
        assert discovery.inspect(conn) is Way.OPTION
