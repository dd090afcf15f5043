"""Where a service is, in a file that its users can read: the node was not known before the job ran."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from pathlib import Path

from ..exceptions import ConfigError

__all__ = ["ServiceFile"]

logger = logging.getLogger("dask_serve.controller")

#: What a proxy calls itself when it listens on all interfaces.
ANY = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104


class ServiceFile:
    """Writes where HTTP is served, as JSON: ``url``, ``scheduler``, ``host`` and ``pid``.

    It is there while the service is, always as a whole, and removed with it unless another service has replaced it.

    Parameters
    ----------
    path : str
        Its directory must exist; where users are to read it, on a file system that they share.
    host : str
        How other nodes call this one, where the proxies listen on all interfaces.

    Raises
    ------
    ConfigError
        Its directory does not exist, or it is one.
    """

    def __init__(self, path: str, scheduler: str, host: str) -> None:
        self.path = Path(path).absolute()
        self._fields = {"scheduler": scheduler, "host": socket.gethostname(), "pid": os.getpid()}
        self._host = f"[{host}]" if ":" in host else host
        self._written = ""
        check(path)

    async def tell(self, url: str, listens: str) -> str:
        """Note where HTTP is served; nowhere if ``url`` is empty. Return what went wrong, or "".

        Parameters
        ----------
        url : str
        listens : str
            The interface that was asked for.
        """
        if listens in ANY:
            url = url.replace(f"//{ANY[listens]}:", f"//{self._host}:", 1)
        text = json.dumps({"url": url, **self._fields}, indent=2) + "\n" if url else ""
        if text == self._written:
            return ""
        try:
            # Shared file systems take their time.
            await asyncio.get_running_loop().run_in_executor(None, self._put, text)
        except OSError as error:
            what = f"the service file {self.path} could not be {'written' if text else 'removed'}: {error}"
            logger.warning("%s", what)
            return what
        return ""

    def _put(self, text: str) -> None:
        if text:
            beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            beside.write_text(text)
            beside.replace(self.path)
        else:
            with contextlib.suppress(FileNotFoundError):
                if self.path.read_text() == self._written:
                    self.path.unlink()
        self._written = text


def check(path: str) -> None:
    """Raise ConfigError if nothing can be written at a path."""
    file = Path(path).absolute()
    if file.is_dir():
        raise ConfigError(f"--service-file {path} is a directory: name a file in it")
    if not file.parent.is_dir():
        raise ConfigError(f"--service-file {path}: there is no directory {file.parent}; make it, or name another file")
