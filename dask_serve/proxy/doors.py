"""TLS between the proxy and the doors, where the Dask cluster has it."""

from __future__ import annotations

import ssl
import tempfile
from pathlib import Path

from msgspec import Struct

__all__ = ["Material", "make_context"]


class Material(Struct, frozen=True):
    """What Dask's own clients show and trust: paths of PEM files, or their text."""

    ca: str
    certificate: str
    key: str | None = None
    ciphers: str | None = None


def make_context(material: Material) -> ssl.SSLContext:
    """Return the context for connections to doors; as in Dask the authority counts, and not a host's name."""
    ca = material.ca
    context = ssl.create_default_context(
        ssl.Purpose.SERVER_AUTH, cafile=None if _is_text(ca) else ca, cadata=ca if _is_text(ca) else None
    )
    context.check_hostname = False
    # Dask's own throw-away authorities are not strict.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    if material.ciphers:
        context.set_ciphers(material.ciphers)
    # OpenSSL reads chains from files only.
    with tempfile.TemporaryDirectory() as directory:
        certificate = _path(material.certificate, Path(directory) / "certificate.pem")
        key = None if material.key is None else _path(material.key, Path(directory) / "key.pem")
        context.load_cert_chain(certificate, key)
    return context


def _path(given: str, place: Path) -> str:
    if not _is_text(given):
        return given
    place.write_text(given, encoding="ascii")
    return str(place)


def _is_text(part: str) -> bool:
    return "\n" in part
