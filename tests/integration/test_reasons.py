"""What both ends say of a connection, in each way in which it can be plain TCP.

Each case runs with two real processes that are restricted for real: another user, a
limit, a filter on system calls. Then again with SMC-R required: the same reason comes
as an error, and the server's application gets no byte.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest

STATIC = {"PYSMC_DISCOVERY": "static", "PYSMC_PEERS": "127.0.0.1"}
SMALL_PINNED = {"PYSMC_MAX_PINNED_BYTES": "1048576"}
SMALL_PINNED_HOLDS = 64
"""Connections with the smallest buffers, 16 KiB."""
NOBODY = 65533
"""A user that is neither root nor the overflow user."""


class Case(NamedTuple):
    """Options of both ends, and what each end says: name and side of its reason."""

    client: tuple[str, str] | None
    server: tuple[str, str] | None
    client_env: dict[str, str] = {}  # noqa: RUF012  # never changed
    server_env: dict[str, str] = {}  # noqa: RUF012
    client_arguments: tuple[str, ...] = ()
    server_arguments: tuple[str, ...] = ()
    peer_code: int | None = None
    """What the end that was declined says of the other's code."""
    before: int = 0
    """Connections that are opened and kept before."""
    detail: str = ""
    """Words in the text of the end that found the reason."""


LOCAL_SIDE, PEER_SIDE = "local", "peer"
NO_SMC = ("PEER_NO_SMC", PEER_SIDE)
DECLINED = ("PEER_DECLINED", PEER_SIDE)
NO_MEMORY = ("NO_MEMORY", LOCAL_SIDE)
MEMORY_CODE = 0x01010000

CASES = {
    "server is stock asyncio": Case(NO_SMC, None, server_arguments=("--stock",)),
    "client is stock asyncio": Case(None, NO_SMC, client_arguments=("--stock",)),
    "no common EID": Case(
        DECLINED, ("NO_COMMON_EID", LOCAL_SIDE), STATIC, STATIC,
        server_arguments=("--eid", "PYSMC-SHM-OF-ELSEWHERE"),
        peer_code=0x03030000, detail="The client offered PYSMC-SHM-",
    ),
    "no fabric at the client": Case(
        ("DISABLED", LOCAL_SIDE), NO_SMC, client_env={"PYSMC_FABRICS": ""}
    ),
    "no fabric at the server": Case(
        NO_SMC, ("DISABLED", LOCAL_SIDE), server_env={"PYSMC_FABRICS": ""}
    ),
    "no discovery at the client": Case(
        ("DISABLED", LOCAL_SIDE), NO_SMC, client_env={"PYSMC_DISCOVERY": ""}
    ),
    "no discovery at the server": Case(
        NO_SMC, ("DISABLED", LOCAL_SIDE), server_env={"PYSMC_DISCOVERY": ""}
    ),
    "no discovery that works at the client": Case(
        ("SETUP_MISSING", LOCAL_SIDE), NO_SMC,
        client_env={"PYSMC_DISCOVERY": "tcp_option"}, detail="'tcp_option'",
    ),
    "no discovery that works at the server": Case(
        NO_SMC, ("SETUP_MISSING", LOCAL_SIDE),
        server_env={"PYSMC_DISCOVERY": "tcp_option"}, detail="'tcp_option'",
    ),
    "no device at the client": Case(
        ("NO_DEVICE", LOCAL_SIDE), NO_SMC,
        client_env={"PYSMC_FABRICS": "verbs"}, detail="verbs",
    ),
    "no device at the server": Case(
        NO_SMC, ("NO_DEVICE", LOCAL_SIDE),
        server_env={"PYSMC_FABRICS": "verbs"}, detail="verbs",
    ),
    "client declines": Case(
        ("LIMIT", LOCAL_SIDE), DECLINED, client_env=SMALL_PINNED,
        peer_code=MEMORY_CODE, before=SMALL_PINNED_HOLDS,
        detail="max_pinned_bytes is 1048576",
    ),
    "server declines": Case(
        DECLINED, ("LIMIT", LOCAL_SIDE), server_env=SMALL_PINNED,
        peer_code=MEMORY_CODE, before=SMALL_PINNED_HOLDS,
        detail="max_pinned_bytes is 1048576",
    ),
    "memory full at the client": Case(
        NO_MEMORY, DECLINED, client_arguments=("--fsize", "65536"),
        peer_code=MEMORY_CODE, detail="EFBIG",
    ),
    "memory full at the server": Case(
        DECLINED, NO_MEMORY, server_arguments=("--fsize", "65536"),
        peer_code=MEMORY_CODE, detail="EFBIG",
    ),
    "memory forbidden at the client": Case(
        NO_MEMORY, DECLINED, client_arguments=("--no-memfd",),
        peer_code=MEMORY_CODE, detail="EPERM",
    ),
    "memory forbidden at the server": Case(
        DECLINED, NO_MEMORY, server_arguments=("--no-memfd",),
        peer_code=MEMORY_CODE, detail="EPERM",
    ),
    "no descriptors at the client": Case(
        ("LIMIT", LOCAL_SIDE), DECLINED, client_arguments=("--nofile", "16"),
        peer_code=MEMORY_CODE, detail="EMFILE",
    ),
    "no descriptors at the server": Case(
        DECLINED, ("LIMIT", LOCAL_SIDE), server_arguments=("--nofile", "19"),
        peer_code=MEMORY_CODE, detail="EMFILE",
    ),
}  # fmt: skip

as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, to become another user"
)


def start(case: Case, pair: Any, **extra: str):
    """Start both ends; gives (server, client, port)."""
    server, client, port = pair(
        case.server_env,
        case.client_env | extra,
        case.server_arguments,
        case.client_arguments,
    )
    if case.before:
        infos = client.ask("connect", port=port, count=case.before)["infos"]
        assert {info["mode"] for info in infos} == {"smcr"}
        server.ask("accepted", count=case.before)
    return server, client, port


def assert_says(info: Any, role: str, expected: tuple[str, str] | None, case: Case):
    """One end's ConnectionInfo is that of plain TCP, with this reason."""
    if expected is None:
        assert info is None, "a stock loop knows nothing"
        return
    assert (info["mode"], info["role"]) == ("tcp", role)
    for field in ("version", "fabric", "link_group", "eid", "local_gid", "peer_gid"):
        assert info[field] is None
    assert_reason(info["reason"], expected, case)


def assert_reason(reason: Any, expected: tuple[str, str] | None, case: Case):
    assert (reason["name"], reason["side"]) == expected, reason["text"]
    assert reason["peer_code"] == (case.peer_code if expected == DECLINED else None)
    if expected not in {NO_SMC, DECLINED}:
        assert case.detail in reason["text"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_both_ends_say_why_it_is_tcp(pair, name):
    case = CASES[name]
    server, client, port = start(case, pair)
    (info,) = client.ask("connect", port=port)["infos"]
    assert client.ask("talk", size=100_000, rounds=2) == {"equal": case.before + 1}
    client.ask("close")
    (accepted,) = server.ask("accepted", count=1, ended=True)["connections"]
    assert accepted["received"] == 200_000
    assert accepted["error"] is None
    assert_says(info, "client", case.client, case)
    assert_says(accepted["info"], "server", case.server, case)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.client])
def test_the_same_reason_as_an_error_where_smc_is_required(pair, name):
    case = CASES[name]
    server, client, port = start(case, pair, PYSMC_FALLBACK="require")
    answer = client.attempt("connect", port=port)
    assert answer["error"] == "Declined"
    assert answer["is_connection_error"]
    assert_reason(answer["reason"], case.client, case)
    (accepted,) = server.ask("accepted", count=1, ended=True)["connections"]
    assert accepted["received"] == 0


@pytest.mark.slow
def test_both_ends_say_that_it_is_smc(pair):
    server, client, port = pair({"PYSMC_RMBE_BYTES": "65536"})
    (info,) = client.ask("connect", port=port)["infos"]
    assert client.ask("talk", size=300_000) == {"equal": 1}
    client.ask("close")
    (accepted,) = server.ask("accepted", count=1, ended=True)["connections"]
    theirs = accepted["info"]
    assert (info["mode"], info["role"], info["reason"]) == ("smcr", "client", None)
    assert (theirs["mode"], theirs["role"], theirs["reason"]) == (
        "smcr",
        "server",
        None,
    )
    for field in ("version", "fabric", "eid", "links"):
        assert info[field] == theirs[field]
    assert (info["version"], info["fabric"]) == ("2.1", "shm")
    assert info["eid"].startswith("PYSMC-SHM-")
    assert (info["local_gid"], info["peer_gid"]) == (
        theirs["peer_gid"], theirs["local_gid"],
    )  # fmt: skip
    assert info["peer_rmbe_bytes"] == theirs["rmbe_bytes"] == 65536
    assert info["rmbe_bytes"] == theirs["peer_rmbe_bytes"] > 65536


@pytest.mark.slow
def test_version_2_0_where_one_end_speaks_no_2_1(pair):
    server, client, port = pair({"PYSMC_RELEASE": "0"})
    (info,) = client.ask("connect", port=port)["infos"]
    assert client.ask("talk") == {"equal": 1}
    (accepted,) = server.ask("accepted", count=1)["connections"]
    assert (info["version"], accepted["info"]["version"]) == ("2.0", "2.0")


@pytest.mark.slow
@as_root
@pytest.mark.parametrize("foreign", ["client", "server"])
def test_another_user_is_refused_until_both_allow_it(programs, foreign):
    arguments = {"client": (), "server": ()} | {foreign: ("--uid", NOBODY)}
    for allowed in ("", f"0,{NOBODY}"):
        env = {"PYSMC_ALLOWED_UIDS": allowed}
        server = programs.agent(*arguments["server"], env=env)
        client = programs.agent(*arguments["client"], env=env)
        port = server.ask("serve")["port"]
        (info,) = client.ask("connect", port=port)["infos"]
        assert client.ask("talk", size=100_000) == {"equal": 1}
        client.ask("close")
        (accepted,) = server.ask("accepted", count=1, ended=True)["connections"]
        if allowed:
            assert info["mode"] == accepted["info"]["mode"] == "smcr"
            continue
        # One end finds it, the other is told; or a beacon of a foreigner is ignored.
        names = [one["reason"]["name"] for one in (info, accepted["info"])]
        assert names[0] == "FOREIGN_USER"
        assert names[1] in {"FOREIGN_USER", "PEER_NO_SMC"}
        assert str(NOBODY) in info["reason"]["text"]


@pytest.mark.slow
def test_beyond_max_handshakes_it_is_tcp(pair):
    _, client, port = pair({}, {"PYSMC_MAX_HANDSHAKES": "1"})
    infos = client.ask("connect", port=port, count=20)["infos"]
    assert client.ask("talk") == {"equal": 20}
    reasons = [info["reason"] for info in infos if info["mode"] == "tcp"]
    assert 1 <= len(reasons) < 20
    for reason in reasons:
        assert (reason["name"], reason["side"]) == ("LIMIT", "local")
        assert "max_handshakes is 1." in reason["text"]
    # One after the other there is room.
    for _ in range(3):
        (info,) = client.ask("connect", port=port)["infos"]
        assert info["mode"] == "smcr"


@pytest.mark.slow
def test_beyond_max_link_groups_it_is_tcp(pair):
    few = {"PYSMC_MAX_LINK_GROUPS_PER_PEER": "1", "PYSMC_MAX_CONNECTIONS": "16"}
    server, client, port = pair(few, few)
    infos = []
    for _ in range(18):
        infos += client.ask("connect", port=port)["infos"]
    assert client.ask("talk") == {"equal": 18}
    assert [info["mode"] for info in infos] == ["smcr"] * 16 + ["tcp"] * 2
    accepted = server.ask("accepted", count=18)["connections"]
    for one in (*infos[16:], *(one["info"] for one in accepted[16:])):
        assert one["reason"]["name"] in {"LIMIT", "PEER_DECLINED"}
    client.ask("close")
    server.ask("accepted")
    (info,) = client.ask("connect", port=port)["infos"]
    assert info["mode"] == "smcr"


@pytest.mark.slow
def test_the_soft_limit_of_descriptors_is_raised(pair):
    _, client, port = pair({}, {}, (), ("--soft-nofile", "64"))
    infos = client.ask("connect", port=port, count=100)["infos"]
    assert {info["mode"] for info in infos} == {"smcr"}
    assert client.ask("talk") == {"equal": 100}


@pytest.mark.slow
def test_a_server_that_requires_smc_never_shows_a_plain_client(pair):
    server, client, port = pair({"PYSMC_FALLBACK": "require"}, {}, (), ("--stock",))
    client.ask("connect", port=port)
    answer = client.attempt("talk")
    assert answer["error"] in {"IncompleteReadError", "ConnectionResetError"}
    assert server.ask("accepted")["connections"] == []
    assert "SMC-R is required but not possible: PEER_NO_SMC" in server.complaint()
