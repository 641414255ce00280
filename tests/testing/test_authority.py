"""The throw-away authority: each kind of certificate is wrong in one way only."""

from __future__ import annotations

import datetime
import ssl
import stat

import pytest

from pysmc.testing.authority import KINDS, Authority

NOW = datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"), NOW)


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost"):
    """Shake hands in memory; gives both ends."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    with pytest.raises(ssl.SSLWantReadError):
        ends[0].read()  # what TLS 1.3 sends after the handshake
    with pytest.raises(ssl.SSLWantReadError):
        ends[1].read()
    return ends


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1"])
@pytest.mark.parametrize("kind", ["server", "intermediate"])
def test_good_certificates(authority, kind, name) -> None:
    client, server = shake(
        authority.server_context(kind), authority.client_context(), name
    )
    assert client.getpeercert(True) == authority.issue(kind).der
    assert server.getpeercert() is None


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("expired", 10),  # X509_V_ERR_CERT_HAS_EXPIRED
        ("not-yet-valid", 9),
        ("unknown", 20),  # UNABLE_TO_GET_ISSUER_CERT_LOCALLY
        ("wrong-name", 62),  # HOSTNAME_MISMATCH
    ],
)
def test_bad_certificates(authority, kind, code) -> None:
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        shake(authority.server_context(kind), authority.client_context())
    assert caught.value.verify_code == code


def test_a_wrong_name_is_all_that_is_wrong(authority) -> None:
    shake(
        authority.server_context("wrong-name"),
        authority.client_context(),
        "elsewhere.invalid",
    )


def test_mutual(authority) -> None:
    client, server = shake(
        authority.server_context(ask_client=True), authority.client_context("client")
    )
    assert server.getpeercert(True) == authority.issue("client").der
    assert client.version() == "TLSv1.3"


def test_another_client_is_refused(authority) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(
            authority.server_context(ask_client=True),
            authority.client_context("unknown"),
        )


def test_time_is_an_argument(tmp_path) -> None:
    past = Authority(tmp_path, NOW - datetime.timedelta(days=30))
    with pytest.raises(ssl.SSLCertVerificationError) as caught:
        shake(past.server_context(), past.client_context())
    assert caught.value.verify_code == 10
    with pytest.raises(ValueError, match="time zone"):
        Authority(tmp_path, NOW.replace(tzinfo=None))


def test_own_names(tmp_path) -> None:
    made = Authority(tmp_path, NOW, names=("files.example",))
    shake(made.server_context(), made.client_context(), "files.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(made.server_context(), made.client_context(), "localhost")


def test_files(authority) -> None:
    for kind in KINDS:
        found = authority.issue(kind)
        assert authority.issue(kind) is found
        assert stat.S_IMODE(found.path.stat().st_mode) == 0o600
        assert found.path.read_text().count("PRIVATE KEY") == 2
    assert authority.root.read_text().count("BEGIN CERTIFICATE") == 1
    assert "PRIVATE" not in authority.root.read_text()
    with pytest.raises(ValueError, match="not-yet-valid"):
        authority.issue("good")
