"""Certificates by which the two ends of a migration prove themselves: an authority, and one per machine.

Elliptic curve P-256, X.509 version 3, good for either end of mutual TLS.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

CA_FILE = "ca.pem"
CERT_FILE = "node.pem"
KEY_FILE = "node.key"

_DAYS = 3650
# Machines' clocks differ: a certificate is good from a day before it was made.
_EARLIER = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What one machine proves itself with, and whom it trusts. PEM."""

    ca_pem: bytes
    cert_pem: bytes
    key_pem: bytes

    def write(self, directory: Path) -> None:
        """Put ca.pem, node.pem and node.key (0600 each) into a directory, made if need be."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, pem in ((CA_FILE, self.ca_pem), (CERT_FILE, self.cert_pem), (KEY_FILE, self.key_pem)):
            (directory / name).unlink(missing_ok=True)
            with open(directory / name, "xb", opener=_open_private) as file:
                file.write(pem)


class Authority:
    """Who issues certificates. The key stays in this object; nothing writes it."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key

    @property
    def ca_pem(self) -> bytes:
        """The authority's own certificate: what its machines trust."""
        return _cert_pem(self._certificate)

    def issue(self, name: str, addresses: Sequence[str]) -> Identity:
        """Make a key and a certificate for one machine.

        Args:
            name: Its host name: the common name, and a name it may be connected to by.
            addresses: Further names and IP addresses it may be connected to by.
        """
        from cryptography import x509

        key = _new_key()
        certificate = _sign(
            subject=name,
            issuer=self._certificate.subject,
            key=key,
            signer=self._key,
            extensions=[
                x509.BasicConstraints(ca=False, path_length=None),
                x509.SubjectAlternativeName([_general_name(each) for each in (name, *addresses)]),
                x509.ExtendedKeyUsage(
                    [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH, x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
            ],
        )
        return Identity(ca_pem=self.ca_pem, cert_pem=_cert_pem(certificate), key_pem=_key_pem(key))


def make_authority(name: str = "godwit") -> Authority:
    """Make a new authority, trusted by nobody yet."""
    from cryptography import x509

    key = _new_key()
    common_name = f"{name} authority"
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    may_sign = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    extensions: list[x509.ExtensionType] = [
        x509.BasicConstraints(ca=True, path_length=0),
        may_sign,
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
    ]
    certificate = _sign(subject=common_name, issuer=subject, key=key, signer=key, extensions=extensions)
    return Authority(certificate, key)


def _sign(
    *,
    subject: str,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    extensions: Sequence[x509.ExtensionType],
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
    )
    for extension in extensions:
        critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(signer, hashes.SHA256())


def _new_key() -> ec.EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _general_name(text: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _cert_pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
