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
from pysmc.discovery import option_server as option_server_module
from pysmc.discovery.mark import keeps_syn
from pysmc.discovery.option import sockets
from pysmc.discovery.option.sockets import OptionState
from pysmc.discovery.option_server import DOUBT_SECONDS, OptionServer
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
    bound.close()
    assert server.inspect(bound) is found.INCOMPLETE


IPV4_SYN = bytes.fromhex("45000040") + bytes(16) + bytes(12) + b"\x80\2" + bytes(6)
SHOWN = IPV4_SYN + bytes.fromhex("fe06e2d4c3d9") + bytes(6)
NOT_SHOWN = IPV4_SYN + bytes.fromhex("020405b4") + bytes(8)
MARKED = b"\x45\x2c" + NOT_SHOWN[2:]


def saved(monkeypatch: pytest.MonkeyPatch, syn: bytes) -> list[Any]:
    """Let connections have a saved SYN; gives those that were asked for it."""
    asked = []

    def read_syn(conn: Any) -> bytes:
        asked.append(conn)
        return syn

    monkeypatch.setattr(option_server_module, "read_syn", read_syn)
    return asked


def test_a_client_of_which_the_kernel_is_in_doubt(
    option: Any, server: OptionServer, bound: Any, open_sockets: Any
) -> None:
    server.open(bound, is_able=True)
    bound.listen()
    option.in_doubt = True
    conn = accepted(bound, open_sockets, option)
    assert OptionState.MAYBE in option.read_state(conn)
    assert server.inspect(conn) is None
    assert server.inspect(accepted(bound, open_sockets)) is found.PEER_NO_SMC


@pytest.mark.parametrize("state", [None, OptionState(0), OptionState(33)])
def test_programs_that_go_before_the_connection_is_looked_at(
    option: Any, bound: Any, monkeypatch: pytest.MonkeyPatch, state: Any
) -> None:
    """The SYN tells that the client may have been answered; but not for ever."""
    now = [0.0]
    server = OptionServer(Presence(lambda: now[0], is_wanted=True))
    server.open(bound, is_able=True)
    asked = saved(monkeypatch, SHOWN)
    monkeypatch.setattr(sockets, "read_state", lambda _: state)
    assert server.inspect(bound) is None
    saved(monkeypatch, NOT_SHOWN)
    why = found.TOO_LATE if state == OptionState(0) else found.INCOMPLETE
    assert server.inspect(bound) is why
    assert (server.take_syn(), server.take_syn()) == (NOT_SHOWN, None)
    asked = saved(monkeypatch, SHOWN)
    now[0] = DOUBT_SECONDS - 1
    assert server.inspect(bound) is None
    now[0] = DOUBT_SECONDS
    assert server.inspect(bound) is why
    assert server.take_syn() is None
    assert len(asked) == 1
    # They came back, and went again.
    monkeypatch.setattr(sockets, "read_state", lambda _: OptionState(37))
    assert server.inspect(bound) is found.PEER_NO_SMC
    monkeypatch.setattr(sockets, "read_state", lambda _: state)
    assert server.inspect(bound) is None


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.usefixtures("option")
def test_beside_a_listener_that_did_not_opt_in(
    server: OptionServer, bound: Any, monkeypatch: pytest.MonkeyPatch, is_given: bool
) -> None:
    """Only the other one's clients may have been answered."""
    server.open(bound, is_able=True)
    asked = saved(monkeypatch, SHOWN)
    with socket.create_server(("127.0.0.1", 0)) as plain:
        server.open(plain, is_able=True)
        for state, why in ((None, found.INCOMPLETE), (OptionState(0), found.TOO_LATE)):
            monkeypatch.setattr(sockets, "read_state", lambda _, state=state: state)
            assert server.inspect(plain, is_given=is_given) is why
            assert asked == []
            assert server.inspect(bound, is_given=is_given) is None
            assert asked.pop() is bound
        monkeypatch.setattr(sockets, "read_state", lambda _: OptionState(33))
        assert server.inspect(plain, is_given=is_given) is None


def test_the_doubt_of_a_listener_ends_beside_one_that_is_sure(
    option: Any, open_sockets: Any, bound: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a program that speaks first would lose every client that asks, for good."""
    now = [0.0]
    server = OptionServer(Presence(lambda: now[0], is_wanted=True))
    younger = socket.socket()
    open_sockets.append(younger)
    younger.bind(("127.0.0.1", 0))
    for one in (bound, younger):
        server.open(one, is_able=True)
    saved(monkeypatch, SHOWN)
    states = {bound: OptionState(0), younger: OptionState(37)}
    monkeypatch.setattr(sockets, "read_state", states.get)
    assert server.inspect(bound) is None
    now[0] = DOUBT_SECONDS
    assert server.inspect(younger) is found.PEER_NO_SMC
    assert server.inspect(bound) is not None
    # The next one at this port begins anew, whoever was in doubt before.
    server.open(bound, is_able=True)
    assert server.inspect(bound) is None


def test_syns_are_kept_before_the_first_client_can_come(
    option: Any, server: OptionServer, bound: Any
) -> None:
    """A client that is answered in the moment of listen() would not be known later."""
    server.open(bound, is_able=True)
    assert keeps_syn(bound)


def test_whoever_brings_a_connection_does_not_say_whose_listener_it_was(
    option: Any, server: OptionServer, bound: Any, open_sockets: Any
) -> None:
    """Another loop's or another process's has opted in."""
    option.opt_in(bound)
    bound.listen()
    conn = accepted(bound, open_sockets, option)
    assert server.inspect(conn) is found.TOO_LATE
    assert server.inspect(conn, is_given=True) is None
    other = accepted(bound, open_sockets)
    assert server.inspect(other, is_given=True) is found.PEER_NO_SMC
    option.is_here = False
    assert server.inspect(conn, is_given=True) is found.TOO_LATE


async def test_a_connection_that_is_brought_where_the_option_is_not_configured(
    kit: Any, option: Any
) -> None:
    listener = kit.bound()
    option.opt_in(listener)
    listener.listen()
    conn = kit.keep(accepted(listener, kit.sockets, option))
    plain = kit.keep(accepted(listener, kit.sockets))
    discovery = Discovery(kit.loop, Config(discovery=("local",)))
    kit.discoveries.append(discovery)
    assert discovery.inspect(conn) is found.NOT_MARKED
    assert discovery.inspect(conn, is_given=True) is Way.OPTION
    assert discovery.inspect(plain, is_given=True) is found.NOT_MARKED


async def test_a_mark_in_a_syn_that_was_read_for_the_option(
    kit: Any, option: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be read only once."""
    server = kit.discovery()
    listener = kit.bound()
    server.opt_in(listener)
    listener.listen()
    server.announce(listener)
    conn = kit.keep(accepted(listener, kit.sockets))
    option.is_here = False
    saved(monkeypatch, MARKED)
    assert server.inspect(conn) is Way.LOCAL
    saved(monkeypatch, NOT_SHOWN)
    assert server.inspect(conn) is found.PEER_NO_SMC


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
