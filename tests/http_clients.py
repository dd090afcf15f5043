"""Real HTTP clients behind one face: curl, httpx, requests, aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import httpx
import pytest
import requests

__all__ = ["CLIENTS", "Answer"]

Body = bytes | Iterable[bytes] | None


class Answer(NamedTuple):
    """What a client made of an answer, redirects followed and codings undone."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@functools.cache
def _has_curl() -> bool:
    if shutil.which("curl") is None:
        return False
    version = subprocess.run(["curl", "--version"], capture_output=True, text=True).stdout.split()[1]
    return tuple(map(int, version.split(".")[:2])) >= (7, 83)


class Curl:
    def __init__(self, url: str) -> None:
        if not _has_curl():
            pytest.skip("needs curl 7.83 or newer")
        self._url = url

    def close(self) -> None:
        pass

    def command(self, *arguments: str, headers: dict[str, str] | None = None) -> list[str]:
        given = [word for name, value in (headers or {}).items() for word in ("--header", f"{name}: {value}")]
        return ["curl", "--silent", "--show-error", "--noproxy", "*", *given, *arguments]

    def request(self, method: str, path: str, *, body: Body = None, headers: dict[str, str] | None = None) -> Answer:
        arguments = ["--location", "--compressed", "--max-time", "30"]
        if method == "HEAD":
            arguments.append("--head")
        elif body is None or method != "POST":
            arguments += ["--request", method]
        if body is not None:
            arguments += ["--data-binary", "@-"]
        if not isinstance(body, bytes | None):
            # It follows the redirect only with a body that it still has.
            arguments += ["--header", "Transfer-Encoding: chunked"]
            body = b"".join(body)
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "body"
            arguments += ["--output", str(file), "--write-out", "%{http_code} %{header_json}"]
            done = subprocess.run(
                self.command(*arguments, self._url + path, headers=headers), input=body, capture_output=True, timeout=60
            )
            assert done.returncode == 0, done.stderr
            content = file.read_bytes() if file.exists() and method != "HEAD" else b""
        status, _, told = done.stdout.decode().partition(" ")
        return Answer(int(status), {name: ", ".join(values) for name, values in json.loads(told).items()}, content)

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[Iterator[bytes]]:
        command = self.command("--no-buffer", self._url + path)
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
            try:
                yield iter(lambda: process.stdout.read(65536), b"")
            finally:
                process.kill()

    def give_up(self, path: str, seconds: float) -> None:
        done = subprocess.run(self.command("--max-time", str(seconds), self._url + path), capture_output=True)
        assert done.returncode == 28, done


class Httpx:
    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, follow_redirects=True, timeout=30, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def request(self, method: str, path: str, *, body: Body = None, headers: dict[str, str] | None = None) -> Answer:
        answer = self._client.request(method, path, content=body, headers=headers)
        return Answer(answer.status_code, {k.lower(): v for k, v in answer.headers.items()}, answer.content)

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[Iterator[bytes]]:
        with self._client.stream("GET", path) as answer:
            yield answer.iter_raw()

    def give_up(self, path: str, seconds: float) -> None:
        with pytest.raises(httpx.ReadTimeout):
            self._client.get(path, timeout=seconds)


class Requests:
    def __init__(self, url: str) -> None:
        self._url = url
        self._session = requests.Session()
        self._session.trust_env = False

    def close(self) -> None:
        self._session.close()

    def request(self, method: str, path: str, *, body: Body = None, headers: dict[str, str] | None = None) -> Answer:
        answer = self._session.request(method, self._url + path, data=body, headers=headers, timeout=30)
        return Answer(answer.status_code, {k.lower(): v for k, v in answer.headers.items()}, answer.content)

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[Iterator[bytes]]:
        with self._session.get(self._url + path, stream=True, timeout=30) as answer:
            yield answer.iter_content(None)

    def give_up(self, path: str, seconds: float) -> None:
        with pytest.raises(requests.ReadTimeout):
            self._session.get(self._url + path, timeout=seconds)


class Aiohttp:
    def __init__(self, url: str) -> None:
        self._url = url
        self._loop = asyncio.new_event_loop()
        self._session = self.run(self._open())

    async def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))

    def run(self, awaitable: Any) -> Any:
        return self._loop.run_until_complete(awaitable)

    def close(self) -> None:
        self.run(self._session.close())
        self._loop.close()

    def request(self, method: str, path: str, *, body: Body = None, headers: dict[str, str] | None = None) -> Answer:
        async def pieces() -> Any:
            for piece in body:
                yield piece

        async def ask() -> Answer:
            data = body if isinstance(body, bytes | None) else pieces()
            async with self._session.request(
                method, self._url + path, data=data, headers=headers, allow_redirects=True
            ) as answer:
                return Answer(
                    answer.status, {k.lower(): v for k, v in answer.headers.items()}, await answer.content.read()
                )

        return self.run(ask())

    @contextlib.contextmanager
    def stream(self, path: str) -> Iterator[Iterator[bytes]]:
        answer = self.run(self._session.get(self._url + path))
        try:
            yield iter(lambda: self.run(answer.content.readany()), b"")
        finally:
            answer.close()

    def give_up(self, path: str, seconds: float) -> None:
        async def ask() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(self._session.get(self._url + path), seconds)

        self.run(ask())


CLIENTS = {"curl": Curl, "httpx": Httpx, "requests": Requests, "aiohttp": Aiohttp}
