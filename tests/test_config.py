from __future__ import annotations

import dataclasses
import platform

import pytest

from pysmc.config import Config


def test_defaults_are_allowed_and_frozen() -> None:
    config = Config()
    assert config.fabrics == ("shm",)
    assert config.discovery == ("tcp_option", "local")
    assert config.fallback == "allow"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.fallback = "require"  # type: ignore[misc]


def test_spinning_is_offered_where_memory_order_was_measured() -> None:
    is_x86 = platform.machine() in {"x86_64", "AMD64"}
    assert bool(Config().busy_poll_us) is is_x86


def test_the_client_waits_longer_for_confirm_link() -> None:
    # Otherwise two Declines can cross, and each is read as application data.
    config = Config()
    server = config.confirm_link_server_wait + 2 * config.decline_wait
    assert config.confirm_link_client_wait >= server
    with pytest.raises(ValueError, match="confirm_link_client_wait is 2.0; .* 4.0"):
        Config(confirm_link_client_wait=2.0)
    with pytest.raises(ValueError, match="at least 4.5"):
        Config(confirm_link_server_wait=2.5)
    with pytest.raises(ValueError, match="at least 6.0"):
        Config.from_env({"PYSMC_DECLINE_WAIT": "2"})
    assert Config(confirm_link_server_wait=0.4, decline_wait=0.2).fabrics


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("fabrics", ("shm", "tcp"), "'verbs'"),
        ("fabrics", ["shm"], "a tuple of"),
        ("fabrics", ("shm", "shm"), "a tuple of"),
        ("discovery", ("dns",), "'local'"),
        ("fallback", "never", '"allow" or "require"'),
        ("rmbe_bytes", 100_000, "power of two from 16384"),
        ("rmbe_bytes", 8192, "power of two from 16384"),
        ("rmbe_bytes", 1 << 30, "to 536870912"),
        ("rmbe_bytes", 65536.0, "power of two"),
        ("sndbuf_bytes", 0, "power of two"),
        ("ueids", ("lower",), "A-Z"),
        ("ueids", ("A" * 33,), "1-32"),
        ("ueids", (".A",), "A-Z"),
        ("ueids", ("A..B",), "A-Z"),
        ("ueids", ("A", "B", "C", "D", "E"), "up to 4"),
        ("ueids", (7,), "up to 4"),
        ("allowed_uids", (-1,), "user numbers"),
        ("allowed_uids", ("root",), "user numbers"),
        ("peers", "10.0.0.1", "host or host:port"),
        ("rdma_device", 5, "text"),
        ("rdma_device", ":1", "name:port:gid_index"),
        ("rdma_device", "rxe0:0", "name:port (1-255)"),
        ("rdma_device", "rxe0:256", "name:port (1-255)"),
        ("rdma_device", "rxe0:1:x", "as in rxe0:1:1"),
        ("rdma_device", "rxe0:1:1:1", "as in rxe0:1:1"),
        ("rdma_device", "../rxe0", "as in rxe0:1:1"),
        ("rdma_device", "rxe0:", "as in rxe0:1:1"),
        ("max_connections", 15, "from 16 to 255"),
        ("max_connections", True, "from 16 to 255"),
        ("max_links", 2, "from 1 to 1"),
        ("release", 2, "from 0 to 1"),
        ("busy_poll_us", -1, "from 0 to 10000"),
        ("accept_wait", 0, "more than 0"),
        ("accept_wait", "6", "seconds"),
        ("idle_group_wait", 86_401, "at most 86400"),
    ],
)
def test_bad_values_name_field_value_and_what_is_allowed(
    field: str, value: object, allowed: str
) -> None:
    with pytest.raises(ValueError, match=field) as caught:
        Config(**{field: value})  # type: ignore[arg-type]
    text = str(caught.value)
    assert repr(value) in text
    assert allowed in text


def test_peers_without_static_discovery_would_do_nothing() -> None:
    with pytest.raises(ValueError, match="discovery contains"):
        Config(peers=("10.0.0.1",))
    config = Config(peers=("10.0.0.1",), discovery=("static",))
    assert config.peers == ("10.0.0.1",)


def test_good_values() -> None:
    config = Config(
        ueids=("PYSMC-TEST", "A.B"), rmbe_bytes=16384, allowed_uids=(0,), fabrics=()
    )
    for device in ("", "rxe0", "mlx5_0:255", "rxe0:1:0"):
        assert Config(rdma_device=device).rdma_device == device
    assert config.ueids == ("PYSMC-TEST", "A.B")


def test_every_field_is_an_environment_variable() -> None:
    sample = {
        "fabrics": ("shm, verbs", ("shm", "verbs")),
        "discovery": ("static,local", ("static", "local")),
        "peers": ("10.0.0.1,[::1]:80", ("10.0.0.1", "[::1]:80")),
        "fallback": (" require ", "require"),
        "ueids": ("A,B", ("A", "B")),
        "allowed_uids": ("1,2", (1, 2)),
        "rdma_device": ("rxe0:1:2", "rxe0:1:2"),
    }
    for field in dataclasses.fields(Config):
        if field.name in sample:
            continue
        default = getattr(Config(), field.name)
        sample[field.name] = (str(default), default)
    environ = {f"PYSMC_{name.upper()}": text for name, (text, _) in sample.items()}
    config = Config.from_env(environ)
    for name, (_, value) in sample.items():
        assert getattr(config, name) == value


def test_an_empty_list_switches_off() -> None:
    assert Config.from_env({"PYSMC_FABRICS": ""}).fabrics == ()


def test_other_variables_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config.from_env({"PYSMC_NEWER": "1", "HOME": "x"}) == Config()
    monkeypatch.setenv("PYSMC_MAX_CONNECTIONS", "16")
    assert Config.from_env().max_connections == 16


@pytest.mark.parametrize("text", ["many", "1.5", ""])
def test_a_variable_that_is_no_number_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="PYSMC_MAX_CONNECTIONS"):
        Config.from_env({"PYSMC_MAX_CONNECTIONS": text})
    with pytest.raises(ValueError, match="PYSMC_ALLOWED_UIDS"):
        Config.from_env({"PYSMC_ALLOWED_UIDS": "root"})
    with pytest.raises(ValueError, match="accept_wait"):
        Config.from_env({"PYSMC_ACCEPT_WAIT": "soon"})
