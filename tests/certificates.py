"""Certificates for tests: authorities that last a day, and what Dask's processes take of them."""

from __future__ import annotations

import datetime as dt
import ipaddress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from distributed import Security

__all__ = ["Authority"]


class Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.path = directory / f"{name}.pem"
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.path.write_bytes(self._sign(self._name, self._key).public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, password: bytes | None = None) -> tuple[Path, Path]:
        """Write a certificate and its key, and return both paths."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate, secret = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        certificate.write_bytes(self._sign(subject, key).public_bytes(serialization.Encoding.PEM))
        how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        secret.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how))
        return certificate, secret

    def flags(self, name: str) -> list[str]:
        """What the commands of Dask take for a process with a certificate of its own."""
        certificate, key = self.issue(name)
        return ["--tls-ca-file", str(self.path), "--tls-cert", str(certificate), "--tls-key", str(key)]

    def security(self, name: str, roles: tuple[str, ...] = ("client",), **more: Any) -> Security:
        """Return what a process of Dask with a certificate of its own is given."""
        certificate, key = self.issue(name)
        files = {
            f"tls_{role}_{kind}": str(path) for role in roles for kind, path in (("cert", certificate), ("key", key))
        }
        return Security(tls_ca_file=str(self.path), require_encryption=True, **files, **more)

    def _sign(self, subject: x509.Name, key: Any) -> x509.Certificate:
        now = dt.datetime.now(dt.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(subject == self._name, None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
            )
        )
        return builder.sign(self._key, hashes.SHA256())
