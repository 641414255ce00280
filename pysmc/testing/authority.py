"""A throw-away certificate authority: certificates good and bad, for tests of TLS.

Decides what is wrong with a certificate, one thing at a time. Keys are made in memory
and live as long as the folder that the caller gives; nothing of it may ever be trusted
outside a test. Needs the package ``cryptography`` (in the extra ``test``), which is why
``pysmc.testing`` does not import this module by itself.

Source: RFC 5280 sections 4.1 and 4.2; the documentation of Python's ssl module.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

if TYPE_CHECKING:
    import os

__all__ = ["KINDS", "Authority", "Identity"]

KINDS = (
    "server",
    "client",
    "expired",
    "not-yet-valid",
    "wrong-name",
    "unknown",
    "intermediate",
)
"""What `Authority.issue` can make.

``server`` and ``client`` are good, and so is ``intermediate`` (a server's, signed by an
authority in between, which is in the chain). ``expired`` and ``not-yet-valid`` are a
server's at another time, ``wrong-name`` is one for another host, and ``unknown`` one
whose authority nobody trusts.
"""

WRONG_NAME = "elsewhere.invalid"
ONE_DAY = datetime.timedelta(days=1)


class Identity(NamedTuple):
    """A certificate with its key, as one PEM file."""

    path: Path
    """The key, the certificate, and the authority in between if there is one."""
    der: bytes
    """The certificate, as ``SSLObject.getpeercert(True)`` gives it."""


class Authority:
    """Makes certificates that are valid for one day around a moment.

    Args:
        folder: Where the PEM files go; it must exist.
        now: The moment, with a time zone. The ssl module knows no time but the
            machine's, so this is usually ``datetime.datetime.now(datetime.UTC)``.
        names: Host names and numeric addresses of the servers.

    Raises:
        ValueError: `now` has no time zone.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        now: datetime.datetime,
        names: tuple[str, ...] = ("localhost", "127.0.0.1", "::1"),
    ) -> None:
        if now.tzinfo is None:
            message = "now needs a time zone: datetime.datetime.now(datetime.UTC)"
            raise ValueError(message)
        self._folder = Path(folder)
        self._now = now
        self._names = names
        self._serial = 0
        self._issued: dict[str, Identity] = {}
        self._root = self._make_pair("root", None)
        self._stranger = self._make_pair("stranger", None)
        self._between = self._make_pair("between", self._root)
        self.root = self._folder / "root.pem"
        """The root's certificate alone, for ``load_verify_locations``."""
        self.root.write_bytes(_pem(self._root.certificate))

    def issue(self, kind: str) -> Identity:
        """Give the certificate of a kind, made at the first call.

        Args:
            kind: One of `KINDS`.

        Raises:
            ValueError: There is no such kind.
        """
        if kind not in KINDS:
            message = f"no kind of certificate is {kind!r}: one of {', '.join(KINDS)}"
            raise ValueError(message)
        if kind not in self._issued:
            self._issued[kind] = self._make_identity(kind)
        return self._issued[kind]

    def server_context(
        self, kind: str = "server", *, ask_client: bool = False
    ) -> ssl.SSLContext:
        """Make the context of a server.

        Args:
            kind: Of its certificate.
            ask_client: Whether clients need a certificate of this authority.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.issue(kind).path)
        if ask_client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.root)
        return context

    def client_context(self, kind: str | None = None) -> ssl.SSLContext:
        """Make the context of a client that trusts this authority alone.

        Args:
            kind: Of its certificate; without one by default.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.root)
        if kind is not None:
            context.load_cert_chain(self.issue(kind).path)
        return context

    def _make_identity(self, kind: str) -> Identity:
        signer, above = self._root, b""
        if kind == "unknown":
            signer = self._stranger
        elif kind == "intermediate":
            signer, above = self._between, _pem(self._between.certificate)
        names = self._names
        if kind == "client":
            names = ()
        elif kind == "wrong-name":
            names = (WRONG_NAME,)
        shift = {"expired": -3 * ONE_DAY, "not-yet-valid": 3 * ONE_DAY}.get(kind)
        made = self._make_pair(kind, signer, names, shift or datetime.timedelta(0))
        path = self._folder / f"{kind}.pem"
        path.touch(mode=0o600)
        path.write_bytes(made.key_pem() + _pem(made.certificate) + above)
        return Identity(path, made.certificate.public_bytes(Encoding.DER))

    def _make_pair(
        self,
        name: str,
        signer: _Pair | None,
        names: tuple[str, ...] | None = None,
        shift: datetime.timedelta = datetime.timedelta(0),
    ) -> _Pair:
        """Make a key and its certificate.

        Args:
            name: The subject's common name.
            signer: None when it signs itself.
            names: Whom it is for; None for an authority.
            shift: How far from now its day is.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer_key = key if signer is None else signer.key
        issuer = subject if signer is None else signer.certificate.subject
        is_authority = names is None
        self._serial += 1
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(self._serial)
            .not_valid_before(self._now + shift - ONE_DAY)
            .not_valid_after(self._now + shift + ONE_DAY)
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(_usage(is_authority=is_authority), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(
                    issuer_key.public_key()
                ),
                critical=False,
            )
        )
        if names:
            where = x509.SubjectAlternativeName([_general_name(n) for n in names])
            builder = builder.add_extension(where, critical=False)
        return _Pair(key, builder.sign(issuer_key, hashes.SHA256()))


class _Pair(NamedTuple):
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _usage(*, is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
