"""``pysmc probe``: a peer that answers by CLC in every way, and peers that do not."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pysmc.cli import main, probe_peer
from pysmc.cli import probe as command
from pysmc.discovery.option import sockets
from pysmc.discovery.option.sockets import OptionState
from pysmc.fabric.shm import host_eid
from smcproto import clc
from smcproto.constants import PathType
from smcproto.diagnosis import PeerDiagnosis
from tests.cli.smc_peer import (
    ACCEPT,
    PATIENCE,
    RELEASE_0,
    REUSED,
    SMC_D,
    UEID,
    VERSION_1,
    Peer,
    declined,
    read,
)

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = {
    "host", "port", "address", "local_address", "tcp_option", "clc", "version",
    "first_contact", "eid", "reason", "detail", "advice", "listed", "offered", "answer",
    "connect_ms", "answer_ms", "ms",
}  # fmt: skip
WANTED = OptionState.WANT | OptionState.DONE


@pytest.fixture(autouse=True)
def option(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Have the option attached, and say what came of it for every socket."""
    for name in ("FABRICS", "UEIDS", "DISCOVERY", "PEERS", "RELEASE"):
        monkeypatch.delenv(f"PYSMC_{name}", raising=False)

    def says(state: OptionState | None) -> None:
        monkeypatch.setattr(sockets, "opt_in", lambda sock: state is not None)
        monkeypatch.setattr(sockets, "read_state", lambda sock: state)
        monkeypatch.setattr(sockets, "is_installed", lambda: state is not None)

    says(WANTED | OptionState.PEER)
    return says


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command; gives its exit code and its object."""

    def run(where: str, *arguments: str) -> tuple[int, Any]:
        code = main(["probe", where, "--json", *arguments])
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.count("\n") == 1
        found = json.loads(captured.out)
        assert set(found) == KEYS
        return code, found

    return run


FAMILIES = pytest.mark.parametrize(
    "family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"]
)


class TestAccept:
    @FAMILIES
    def test_every_field_and_a_peer_in_order(self, family, serve, ask):
        peer = serve(ACCEPT, family)
        code, found = ask(peer.name, "--ueid", UEID)
        assert code == 0
        row = {
            "host": peer.host,
            "port": peer.port,
            "address": peer.host,
            "tcp_option": True,
            "clc": "accept",
            "version": "2.1",
            "first_contact": True,
            "eid": UEID,
            "reason": None,
            "advice": "",
            "listed": False,
        }
        assert {key: found[key] for key in row} == row
        values = {line["field"]: line["value"] for line in found["answer"]}
        assert values["qp_number"] == "0x222"
        assert values["v2.first_contact.host_name"] == "'server'"
        assert values["message"] == "Accept"
        assert 0 < found["answer_ms"] <= found["ms"]
        assert 0 < found["connect_ms"] <= found["ms"]
        proposal = peer.done().proposal
        # A Decline of version 2, then the end of the stream, and no reset.
        decline = clc.Decline.parse(peer.rest)
        assert len(peer.rest) == 44
        assert (decline.version, decline.out_of_sync) == (2, False)
        assert decline.peer_id == proposal.peer_id
        assert decline.diagnosis == PeerDiagnosis.NO_DEVICE

    @pytest.mark.parametrize(
        ("answer", "version", "first_contact", "eid", "decline_bytes"),
        [
            (RELEASE_0, "2.0", True, UEID, 44),
            (REUSED, None, False, UEID, 44),
            (VERSION_1, "1", True, None, 28),
        ],
    )
    def test_other_versions(
        self, answer, version, first_contact, eid, decline_bytes, serve, ask
    ):
        peer = serve(answer)
        code, found = ask(peer.name)
        assert (code, found["clc"], found["version"]) == (0, "accept", version)
        assert (found["first_contact"], found["eid"]) == (first_contact, eid)
        assert len(peer.done().rest) == decline_bytes

    def test_smc_d_was_not_offered(self, serve, ask):
        peer = serve(SMC_D)
        code, found = ask(peer.name)
        assert (code, found["clc"], found["version"]) == (0, "accept", "1")
        assert "SMC-D" in found["detail"]
        assert clc.Decline.parse(peer.done().rest).diagnosis == PeerDiagnosis.MODE

    def test_each_probe_is_somebody_new(self, serve, ask):
        """A peer must never find a link group of ours."""
        ids = set()
        for _ in range(3):
            peer = serve(ACCEPT)
            ask(peer.name)
            ids.add(peer.done().proposal.peer_id)
        assert len(ids) == 3

    def test_a_slow_peer(self, serve, ask):
        def answer(peer: Peer, sock: socket.socket) -> None:
            peer.propose(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in ACCEPT.build():
                sock.sendall(bytes([byte]))

        assert ask(serve(answer).name)[1]["clc"] == "accept"

    def test_a_peer_that_talks_after_the_decline(self, serve, ask):
        """A service that greets: it is heard out, and sees the end of the stream."""

        def answer(peer: Peer, sock: socket.socket) -> None:
            peer.propose(sock)
            sock.sendall(ACCEPT.build())
            read(sock, 44)
            sock.sendall(b"220 ready\r\n" * 1000)

        peer = serve(answer)
        assert ask(peer.name)[1]["clc"] == "accept"
        assert peer.done().rest == b""

    def test_a_peer_that_is_gone_before_the_decline(self, serve, ask, monkeypatch):
        """What it answered is told as it came."""
        accepted, gone = threading.Event(), threading.Event()
        decline = probe_peer._decline

        def answer(peer: Peer, sock: socket.socket) -> None:
            peer.propose(sock)
            sock.sendall(ACCEPT.build())
            assert accepted.wait(PATIENCE)
            linger = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            sock.close()
            gone.set()
            raise SystemExit

        def late(*words: Any) -> clc.Decline:
            accepted.set()
            assert gone.wait(PATIENCE)
            return decline(*words)

        monkeypatch.setattr(probe_peer, "_decline", late)
        code, found = ask(serve(answer).name)
        assert (code, found["clc"], found["reason"]) == (0, "accept", None)
        assert found["detail"] == "The peer accepts, with a new link group."

    def test_a_peer_that_never_stops_talking(self, serve, ask, monkeypatch):
        monkeypatch.setattr(probe_peer, "GOODBYE_BYTES", 1 << 16)
        stopped = threading.Event()

        def answer(peer: Peer, sock: socket.socket) -> None:
            peer.propose(sock)
            sock.sendall(ACCEPT.build())
            try:
                while True:
                    sock.sendall(bytes(1 << 16))
            except ConnectionError:
                stopped.set()
                raise SystemExit from None

        peer = serve(answer)
        assert ask(peer.name)[0] == 0
        assert stopped.wait(PATIENCE)

    def test_a_peer_that_never_closes(self, serve, ask, monkeypatch):
        monkeypatch.setattr(probe_peer, "GOODBYE_SECONDS", 0.05)
        left = threading.Event()

        def answer(peer: Peer, sock: socket.socket) -> None:
            peer.propose(sock)
            sock.sendall(ACCEPT.build())
            assert left.wait(PATIENCE)

        peer = serve(answer)
        assert ask(peer.name)[0] == 0
        left.set()
        peer.done()


class TestDecline:
    @pytest.mark.parametrize("version", [1, 2])
    def test_says_why_and_what_to_do(self, version, serve, ask):
        peer = serve(declined(version, PeerDiagnosis.SUBNET))
        code, found = ask(peer.name)
        assert (code, found["clc"], found["reason"]) == (0, "decline", "SUBNET")
        assert (found["version"], found["first_contact"]) == (None, None)
        assert found["eid"] is None
        assert "03070000" in found["detail"]
        assert "version 2" in found["advice"]
        # A Decline is never answered.
        assert peer.done().rest == b""

    def test_an_unknown_code(self, serve, ask):
        found = ask(serve(declined(2, 0x12345678)).name)[1]
        assert found["reason"] == "UNKNOWN"
        assert "12345678" in found["detail"]

    @pytest.mark.parametrize(
        "code",
        [PeerDiagnosis.NO_DEVICE, PeerDiagnosis.NO_UEID, PeerDiagnosis.NO_SMCR_DEVICE],
    )
    def test_what_we_lack_may_be_the_cause(self, code, serve, ask):
        found = ask(serve(declined(2, code)).name)[1]
        assert "No UEID is set (PYSMC_UEIDS, --ueid)" in found["advice"]
        found = ask(serve(declined(2, PeerDiagnosis.VLAN)).name)[1]
        assert "UEID" not in found["advice"]


class TestOffer:
    def offered(self, serve, ask, *arguments):
        peer = serve(declined(2, PeerDiagnosis.NO_DEVICE))
        found = ask(peer.name, *arguments)[1]["offered"]
        return found, peer.done().proposal

    def test_the_defaults(self, serve, ask):
        found, proposal = self.offered(serve, ask)
        assert found["eids"] == list(proposal.v2.eids) == [host_eid()]
        assert (proposal.typev1, proposal.typev2) == (PathType.NONE, PathType.SMCR)
        assert found["peer_id"] == proposal.peer_id.hex()
        assert (found["release"], proposal.v2.release) == (1, 1)
        # Without a UEID no device is looked for.
        assert (found["device"], found["gid"]) == (None, "127.0.0.1")
        assert proposal.v2.gid == bytes(10) + b"\xff\xff\x7f\0\0\x01"
        assert "No UEID is set" in found["note"]

    def test_more_of_them(self, serve, ask, monkeypatch):
        monkeypatch.setenv("PYSMC_FABRICS", "verbs")
        monkeypatch.setenv("PYSMC_UEIDS", "FIRST,SECOND")
        monkeypatch.setenv("PYSMC_RELEASE", "0")
        found, proposal = self.offered(serve, ask, "--ueid=SECOND", "--ueid", "THIRD")
        assert found["eids"] == ["SECOND", "THIRD", "FIRST"]
        assert (found["release"], proposal.v2.max_connections) == (0, 0)

    def test_nothing_at_all_is_an_offer_too(self, serve, ask, monkeypatch):
        monkeypatch.setenv("PYSMC_FABRICS", "verbs")
        found, proposal = self.offered(serve, ask)
        assert found["eids"] == list(proposal.v2.eids) == []

    def test_a_host_that_does_not_know_itself(self, serve, ask, monkeypatch):
        def host() -> str:
            raise FileNotFoundError(2, "No such file")

        monkeypatch.setattr("pysmc.cli.probe_offer.host_eid", host)
        found, _ = self.offered(serve, ask)
        assert found["eids"] == []
        assert found["note"].startswith("No EID of shared memory")

    def test_a_device(self, serve, ask, monkeypatch, roce_port):
        monkeypatch.setattr(
            "pysmc.cli.probe_offer.PortFinder.find", lambda *way: roce_port
        )
        found, proposal = self.offered(serve, ask, "--ueid", UEID)
        assert (found["device"], found["note"]) == ("rxe0:1:1", "")
        assert proposal.v2.gid == roce_port.gid
        assert proposal.mac == roce_port.mac
        assert found["gid"] == "10.0.0.7"

    def test_no_device_is_said(self, serve, ask, monkeypatch, tmp_path):
        found, proposal = self.offered(serve, ask, "--ueid", UEID)
        assert found["eids"] == [host_eid(), UEID]
        if found["device"] is None:
            assert "No RDMA device of this machine fits" in found["note"]
            assert proposal.mac == proposal.peer_id[2:]

    def test_ipv6(self, serve, ask):
        peer = serve(declined(2, PeerDiagnosis.NO_DEVICE), socket.AF_INET6)
        found = ask(peer.name)[1]
        assert found["offered"]["gid"] == "::1"
        assert found["local_address"].startswith("[::1]:")


@pytest.fixture
def roce_port() -> Any:
    from pysmc.fabric.verbs_ports import ROCE_V2, RdmaPort

    return RdmaPort(
        device="rxe0",
        port=1,
        gid_index=1,
        gid=bytes(10) + b"\xff\xff\x0a\0\0\x07",
        gid_type=ROCE_V2,
        netdev="va",
        mac=bytes.fromhex("02005e005301"),
        state="ACTIVE",
        mtu_code=3,
    )


class TestNoSmc:
    def test_without_the_option_no_byte_is_sent(self, serve, ask, option):
        option(WANTED)
        peer = serve()
        code, found = ask(peer.name)
        assert (code, found["tcp_option"], found["clc"]) == (1, False, "none")
        assert (found["reason"], found["offered"]) == ("PEER_NO_SMC", None)
        assert peer.done().rest == b""

    def test_where_the_option_is_not_attached(self, serve, ask, option):
        option(None)
        peer = serve()
        code, found = ask(peer.name)
        assert (code, found["tcp_option"], found["clc"]) == (1, None, "none")
        assert found["reason"] == "SETUP_MISSING"
        assert "pysmc option attach" in found["advice"]
        assert peer.done().rest == b""

    def test_a_set_up_of_which_a_part_is_missing(self, serve, ask, option):
        option(OptionState.WANT)
        peer = serve()
        code, found = ask(peer.name)
        assert (code, found["tcp_option"]) == (1, None)
        assert found["reason"] == "SETUP_MISSING"
        assert "attach' again" in found["advice"]
        assert peer.done().rest == b""

    def test_a_listed_peer_is_asked_all_the_same(self, serve, ask, option, monkeypatch):
        option(None)
        peer = serve(ACCEPT)
        monkeypatch.setenv("PYSMC_DISCOVERY", "static")
        monkeypatch.setenv("PYSMC_PEERS", peer.name)
        code, found = ask(peer.name)
        assert (code, found["tcp_option"], found["clc"]) == (0, None, "accept")
        assert (found["listed"], found["reason"]) == (True, None)

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "looks like HTTP"),
            (b"\x15\x03\x03\0\x02\x02\x46", "looks like TLS"),
            (b"220 mail.example.org ESMTP\r\n", "220 mail"),
            (bytes(64), "0000"),
            (b"\xe2\xd4\xc3\xd9\x09\0\x1c\x20" + bytes(20), "type"),
        ],
    )
    def test_garbage(self, said, words, serve, ask):
        code, found = ask(serve(said).name)
        assert (code, found["clc"], found["reason"]) == (1, "none", "NO_CLC")
        assert words in found["detail"] + found["advice"]
        assert found["tcp_option"] is True

    def test_garbage_of_a_listed_peer(self, serve, ask, monkeypatch):
        peer = serve(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        monkeypatch.setenv("PYSMC_DISCOVERY", "static")
        monkeypatch.setenv("PYSMC_PEERS", "127.0.0.1")
        assert "out of PYSMC_PEERS" in ask(peer.name)[1]["advice"]

    def test_a_client_at_the_other_end(self, serve, ask):
        def answer(peer: Peer, sock: socket.socket) -> None:
            sock.sendall(peer.propose(sock).build())

        code, found = ask(serve(answer).name)
        assert (code, found["clc"], found["reason"]) == (1, "none", "NO_CLC")
        assert "sent a Proposal" in found["detail"]

    def test_silence(self, serve, ask):
        code, found = ask(serve().name, "--timeout", "0.1")
        assert (code, found["clc"], found["reason"]) == (1, "none", "NO_ANSWER")
        assert found["ms"] >= 100
        assert found["offered"] is not None

    def test_half_an_answer(self, serve, ask):
        peer = serve(ACCEPT.build()[:50])
        code, found = ask(peer.name, "--timeout", "0.1")
        assert (code, found["clc"], found["reason"]) == (1, "none", "NO_ANSWER")

    @pytest.mark.parametrize("count", [0, 4, 40])
    def test_a_peer_that_closes(self, count, serve, ask):
        def answer(peer: Peer, sock: socket.socket) -> None:
            peer.propose(sock)
            sock.sendall(ACCEPT.build()[:count])
            sock.shutdown(socket.SHUT_WR)

        code, found = ask(serve(answer).name)
        assert (code, found["clc"], found["reason"]) == (1, "none", "CLOSED")
        assert (f"after {count} bytes" in found["detail"]) is (count > 0)

    def test_a_peer_that_resets(self, serve, ask):
        def answer(peer: Peer, sock: socket.socket) -> None:
            peer.propose(sock)
            linger = b"\1\0\0\0\0\0\0\0"  # on, without waiting: a reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            sock.close()
            raise SystemExit

        code, found = ask(serve(answer).name)
        assert (code, found["clc"], found["reason"]) == (1, "none", "CLOSED")
        assert "reset" in found["detail"]

    @pytest.mark.parametrize("listed", [True, False])
    def test_a_tls_server(self, listed, serve, ask, option, monkeypatch):
        """OpenSSL closes over a Proposal; without being listed it gets none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

        def answer(peer: Peer, sock: socket.socket) -> None:
            with pytest.raises(ssl.SSLError):
                context.wrap_socket(sock, server_side=True)
            raise SystemExit

        option(WANTED)
        peer = serve(answer)
        if listed:
            monkeypatch.setenv("PYSMC_DISCOVERY", "static")
            monkeypatch.setenv("PYSMC_PEERS", peer.name)
        code, found = ask(peer.name)
        assert (code, found["clc"], found["tcp_option"]) == (1, "none", False)
        if listed:
            assert found["reason"] == "CLOSED"
            assert "PYSMC_PEERS" in found["advice"]
        else:
            assert found["reason"] == "PEER_NO_SMC"


class TestNoConnection:
    def test_refused(self, ask):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            code, found = ask(f"127.0.0.1:{taken.getsockname()[1]}")
        assert (code, found["clc"], found["reason"]) == (1, "none", "REFUSED")
        assert (found["tcp_option"], found["address"]) == (None, None)
        assert (found["connect_ms"], found["answer_ms"]) == (None, None)
        assert "127.0.0.1: connection refused" in found["detail"]

    def test_no_such_name(self, ask, monkeypatch):
        def look_up(*arguments: Any, **named: Any) -> Any:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        code, found = ask("nowhere.invalid:80")
        assert (code, found["reason"], found["clc"]) == (1, "NO_ADDRESS", "none")
        assert "Name or service not known" in found["detail"]

    @pytest.mark.parametrize("name", ["a" * 64, "db..example.org"])
    def test_a_name_that_is_none(self, name, ask):
        code, found = ask(f"{name}:80")
        assert (code, found["reason"], found["clc"]) == (1, "NO_ADDRESS", "none")
        assert "label" in found["detail"]

    def test_reset_at_once(self, serve, ask, monkeypatch):
        """By then the kernel no longer tells who the peer was."""
        peer = serve()

        def nobody(sock: socket.socket) -> Any:
            raise OSError(107, "Transport endpoint is not connected")

        monkeypatch.setattr(socket.socket, "getpeername", nobody)
        code, found = ask(peer.name, "--ueid", UEID)
        assert (code, found["clc"], found["reason"]) == (1, "none", "CLOSED")
        assert (found["address"], found["tcp_option"]) == (peer.host, True)

    def test_a_name_with_several_addresses(self, serve, ask, monkeypatch):
        """The one that takes the connection is asked."""
        peer = serve(ACCEPT)
        with socket.socket() as closed:
            closed.bind(("127.0.0.2", peer.port))
            rows = [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, peer.port))
                for host in ("127.0.0.2", "127.0.0.1")
            ]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **n: rows)
            code, found = ask(f"db.example.org:{peer.port}")
        assert (code, found["clc"], found["address"]) == (0, "accept", "127.0.0.1")
        assert found["host"] == "db.example.org"

    @pytest.mark.parametrize(
        ("error", "name"),
        [
            (OSError(113, "No route to host"), "UNREACHABLE"),
            (OSError(101, "Network is unreachable"), "UNREACHABLE"),
            (ConnectionResetError(104, "Connection reset by peer"), "CLOSED"),
            (TimeoutError(), "TIMEOUT"),
        ],
    )
    @pytest.mark.parametrize("attached", [True, False])
    def test_nobody_there(self, attached, error, name, ask, option, monkeypatch):
        if not attached:
            option(None)

        def connect(sock: socket.socket, address: Any) -> None:
            raise error

        monkeypatch.setattr(socket.socket, "connect", connect)
        code, found = ask("192.0.2.1:80")
        assert (code, found["clc"], found["reason"]) == (1, "none", name)
        assert found["tcp_option"] is None

    def test_a_filter_that_drops_the_option(self, serve, ask, monkeypatch):
        """The second SYN goes without it, and no byte of SMC follows."""
        peer, marked = serve(), set()
        connect = socket.socket.connect

        def opt_in(sock: socket.socket) -> bool:
            marked.add(sock.fileno())
            return True

        def filtered(sock: socket.socket, address: Any) -> None:
            if sock.fileno() in marked:
                marked.clear()
                raise TimeoutError
            connect(sock, address)

        monkeypatch.setattr(sockets, "opt_in", opt_in)
        monkeypatch.setattr(socket.socket, "connect", filtered)
        code, found = ask(peer.name)
        assert (code, found["clc"], found["reason"]) == (1, "none", "OPTION_DROPPED")
        assert (found["tcp_option"], found["offered"]) == (None, None)
        assert peer.done().rest == b""


class TestMistakes:
    @pytest.mark.parametrize(
        "text",
        [
            "", "host", "host:", ":80", "host:0", "host:65536", "host:http", "::1:80",
            "[::1]", "[::1:80", "user@host:80", "host:80/path", "host:80?q", "a b:80",
        ],
    )  # fmt: skip
    def test_what_is_no_peer(self, text, capsys):
        assert main(["probe", "--json", text]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "HOST:PORT" in captured.err

    @pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e9"])
    def test_time_that_is_none(self, seconds, capsys):
        assert main(["probe", "127.0.0.1:80", f"--timeout={seconds}"]) == 2
        assert "--timeout wants" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [[], ["a:1", "b:2"], ["a:1", "--what"]])
    def test_usage(self, arguments, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["probe", *arguments])
        assert ended.value.code == 2

    @pytest.mark.parametrize(
        ("environ", "arguments", "words"),
        [
            ({}, ["--ueid", "small"], "ueids is"),
            ({}, [f"--ueid=U{n}" for n in range(5)], "ueids is"),
            ({"PYSMC_RELEASE": "7"}, [], "release is"),
            (
                {"PYSMC_DISCOVERY": "static", "PYSMC_PEERS": "db.example.org"},
                [],
                "peers contains",
            ),
        ],
    )
    def test_settings(self, environ, arguments, words, monkeypatch, capsys):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        assert main(["probe", "127.0.0.1:80", *arguments]) == 2
        assert words in capsys.readouterr().err


class TestForPeople:
    def show(self, capsys, where, *arguments):
        code = main(["probe", where, *arguments])
        captured = capsys.readouterr()
        assert captured.err == ""
        lines = captured.out.splitlines()
        assert all(line == line.rstrip() for line in lines)
        return code, lines

    def test_an_accept(self, serve, capsys):
        peer = serve(ACCEPT)
        code, lines = self.show(capsys, peer.name, "--ueid", UEID)
        text = "\n".join(lines)
        assert code == 0
        heads = [line.split()[0] for line in lines if not line.startswith(" ")]
        assert heads == ["TCP", "option", "offered", "answer", "result"]
        assert f"127.0.0.1 port {peer.port} speaks SMC 2.1 and accepts" in text
        assert f"EID {UEID}." in text
        assert "qp_number" in text

    def test_a_decline(self, serve, capsys):
        peer = serve(declined(2, PeerDiagnosis.SUBNET))
        code, lines = self.show(capsys, peer.name)
        assert code == 0
        assert "speaks SMC, but declines (SUBNET)." in "\n".join(lines)
        assert lines[-1].startswith("         -> ")

    def test_a_plain_server(self, serve, capsys, option):
        option(WANTED)
        code, lines = self.show(capsys, serve().name)
        assert code == 1
        assert "option   the SYN-ACK did not carry it" in lines
        assert "does not speak SMC (PEER_NO_SMC)." in "\n".join(lines)

    def test_what_cannot_be_known(self, serve, capsys, option):
        option(None)
        code, lines = self.show(capsys, serve().name)
        assert code == 1
        assert "is not known (SETUP_MISSING)." in "\n".join(lines)

    def test_what_shows_the_option_and_speaks_something_else(self, serve, capsys):
        peer = serve(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        code, lines = self.show(capsys, peer.name)
        assert code == 1
        assert "shows the SMC option, but no answer of SMC (NO_CLC)" in "\n".join(lines)

    def test_a_listed_peer_without_a_device(self, serve, capsys, option, monkeypatch):
        option(None)
        peer = serve(replace(REUSED, version=1, v2=None))
        monkeypatch.setenv("PYSMC_DISCOVERY", "static")
        monkeypatch.setenv("PYSMC_PEERS", peer.name)
        code, lines = self.show(capsys, peer.name)
        assert code == 0
        assert "option   not known; PYSMC_PEERS lists the peer" in lines

    def test_nobody_there(self, capsys):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            code, lines = self.show(capsys, f"127.0.0.1:{port}")
        assert code == 1
        assert lines[0] == f"result   127.0.0.1 port {port} cannot be asked (REFUSED)."


def test_it_is_quick_to_load(pysmc) -> None:
    """A mistake costs no look at fabrics and codecs."""
    assert command.HELP
    done = pysmc("probe", "nothing")
    assert (done.code, done.out) == (2, "")
