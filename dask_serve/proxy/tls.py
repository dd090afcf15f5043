"""TLS between clients and the proxy, with certificates that can be replaced while it runs."""

from __future__ import annotations

import ssl
from collections.abc import Callable

from ..config import HTTPOptions
from ..exceptions import ConfigError
from .files import Watched, read_private

__all__ = ["Certificates"]


class Certificates:
    """The context for a listener, and what keeps it up to date.

    Attributes
    ----------
    context : ssl.SSLContext
        Stays the same for the life of the listener; each handshake uses the latest certificates all the same.
    watched : Watched
    """

    def __init__(self, options: HTTPOptions) -> None:
        self._options = options
        self._latest = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        paths = (options.tls_certificate, options.tls_key, options.tls_key_password_file, options.tls_client_ca)
        self.watched = Watched([path for path in paths if path is not None], self._load)
        self.context: ssl.SSLContext = self._latest
        self.context.sni_callback = self._choose

    def _load(self) -> None:
        self._latest = _make_context(self._options)

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, context: ssl.SSLContext) -> None:
        # OpenSSL asks with every handshake, whether the client named a server or not.
        if self._latest is not context:
            connection.context = self._latest


def _make_context(options: HTTPOptions) -> ssl.SSLContext:
    assert options.tls_certificate is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    password = _password(options.tls_key_password_file)
    try:
        context.load_cert_chain(options.tls_certificate, options.tls_key, password)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tls_certificate={options.tls_certificate!r}, tls_key={options.tls_key!r} cannot be used: {error}"
        ) from None
    if options.tls_client_ca is not None:
        try:
            context.load_verify_locations(options.tls_client_ca)
        except (OSError, ValueError) as error:
            raise ConfigError(f"tls_client_ca={options.tls_client_ca!r} cannot be used: {error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
        # A session that is taken up again is not checked again, though its authority may have been removed since.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
    return context


def _password(path: str | None) -> Callable[[], str]:
    """Return what to call for the password of a key; without it OpenSSL would ask the terminal."""
    if path is None:

        def missing() -> str:
            raise ValueError("the key has a password: write it to a file and name it with tls_key_password_file")

        return missing
    password = read_private(path, "tls_key_password_file").strip("\r\n")
    return lambda: password
