"""Bearer tokens: who may send requests."""

from __future__ import annotations

import hashlib
import hmac
import re

from ..config import HTTPOptions
from ..exceptions import ConfigError
from .errors import Headers
from .files import Watched, read_private

__all__ = ["TokenFile", "Tokens", "refusal"]

#: Fewer characters could be guessed.
SHORTEST = 16
_token = re.compile(r"[A-Za-z0-9._~+/=-]+").fullmatch


class Tokens:
    """The tokens of the service and of single applications.

    Attributes
    ----------
    watched : list of Watched
    """

    def __init__(self, options: HTTPOptions) -> None:
        self._service: TokenFile | None = None
        if options.tokens_file is not None:
            self._service = TokenFile(options.tokens_file, "tokens_file")
        self._applications = {
            name: None if path is None else TokenFile(path, f"application_tokens[{name!r}]")
            for name, path in options.application_tokens.items()
        }
        files = [self._service, *self._applications.values()]
        self.watched = [file.watched for file in files if file is not None]

    def allow(self, headers: Headers, application: str | None) -> str | None:
        """Return None where a request may pass, else why it may not.

        Parameters
        ----------
        headers : sequence
            Of the request.
        application : str or None
            For which it is; None: the service itself.
        """
        file = self._service if application is None else self._applications.get(application, self._service)
        return None if file is None else refusal(headers, file)


class TokenFile:
    """The tokens of a file.

    Parameters
    ----------
    path : str
        The file.
    option : str
        The option that names it, for messages.

    Attributes
    ----------
    watched : Watched

    Raises
    ------
    ConfigError
        It cannot be read, others may read it, or it holds no tokens.
    """

    def __init__(self, path: str, option: str) -> None:
        self._path = path
        self._option = option
        self._digests: list[bytes] = []
        self.watched = Watched([path], self._load)

    def _load(self) -> None:
        lines = read_private(self._path, self._option).splitlines()
        tokens = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not tokens:
            raise ConfigError(f"{self._option}: {self._path} holds no token; write one a line")
        for number, token in enumerate(tokens, 1):
            if len(token) < SHORTEST or not _token(token):
                raise ConfigError(
                    f"{self._option}: token {number} in {self._path} is not valid: it has at least {SHORTEST} letters, "
                    "digits and characters of ._~+/=-; make one with `openssl rand -hex 32`"
                )
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

    def holds(self, token: bytes) -> bool:
        """Compare with all tokens; the time it takes tells nothing about them."""
        digest = hashlib.sha256(token).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def refusal(headers: Headers, file: TokenFile) -> str | None:
    """Return None where a request has a token of ``file``, else why it may not pass."""
    given = [value for name, value in headers if name == b"authorization"]
    if len(given) != 1:
        return "this needs a token: send the header `Authorization: Bearer TOKEN`"
    scheme, _, token = given[0].partition(b" ")
    if scheme.lower() != b"bearer" or not file.holds(token.strip()):
        return "the token is not valid"
    return None
