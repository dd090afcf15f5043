"""What pages in a browser do: fetch, EventSource, WebSocket, CORS. Chromium is driven by its own debugging protocol.

Slow, because few machines have Chromium (Debian: ``apt install chromium``); without it they are skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from web_service import LONG, MESSAGE_LIMIT, WebService, running, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="needs Chromium: no chromium, chromium-browser or google-chrome in PATH"
    ),
]


class Browser:
    """One page of a headless browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (answer := json.loads(self._socket.recv(timeout=30))).get("id") != number:
            pass  # an event
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        assert "errorText" not in (answer := self.call("Page.navigate", url=url)), answer
        wait_until(lambda: self.run("return document.readyState + ' ' + location.href") == f"complete {url}")

    def run(self, script: str) -> Any:
        """Run the body of an ``async`` function in the page."""
        expression = f"(async () => {{ {script} }})()"
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def close(self) -> None:
        with contextlib.suppress(ConnectionClosed):
            self.call("Browser.close")


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    home = tmp_path_factory.mktemp("chromium")
    command = [CHROMIUM, "--headless=new", "--disable-gpu", "--no-first-run", "--no-proxy-server"]
    command += [f"--user-data-dir={home}", "--remote-debugging-port=0", "--disable-dev-shm-usage"]
    # A page that is left would live on for the way back.
    command += ["--disable-features=BackForwardCache", "about:blank"]
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")
    with (home / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            told = Path(home) / "DevToolsActivePort"
            wait_until(lambda: told.exists() and "\n" in told.read_text(), 60)
            port = told.read_text().splitlines()[0]
            pages = [page for page in httpx.get(f"http://127.0.0.1:{port}/json/list").json() if page["type"] == "page"]
            with connect(pages[0]["webSocketDebuggerUrl"], max_size=None) as socket:
                browser = Browser(socket)
                yield browser
                browser.close()
            process.wait(30)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def service() -> Iterator[WebService]:
    with running() as service:
        yield service


@pytest.fixture
def page(browser: Browser, service: WebService) -> Browser:
    """A page of the service itself."""
    browser.open(f"{service.url}/web/page")
    return browser


def note(service: WebService, name: str, word: str = "") -> list[Any]:
    return httpx.get(f"{service.url}/web/note/{name}", params={"word": word}).json()


def test_fetch(page):
    told = page.run("return await (await fetch('/web/echo?a=ä', {method: 'POST', body: 'x'.repeat(3e6)})).json()")
    assert (told["method"], told["query"], told["size"]) == ("POST", {"a": "ä"}, 3_000_000)
    assert page.run("return (await fetch('/web/long', {method: 'HEAD'})).headers.get('content-length')") == str(
        len(LONG)
    )
    answer = page.run(
        "let a = await fetch('/web/slashed', {method: 'POST', body: 'kept'}); return [a.url, await a.json()]"
    )
    assert answer[0].endswith("/web/slashed/")
    assert answer[1] == {"path": "/web/slashed/", "body": "kept"}


def test_connections_are_kept(page):
    ports = page.run(
        """let ports = new Set();
        for (let i = 0; i < 5; i++) ports.add((await (await fetch('/web/echo')).json()).port);
        return ports.size"""
    )
    assert ports == 1


def test_errors(page):
    for path, body, status, kind in (
        ("/nowhere", "null", 404, "NotFound"),
        ("/small", "'x'.repeat(5000)", 413, "BodyTooLarge"),
        ("/small", "'x'.repeat(5e6)", 413, "BodyTooLarge"),
    ):
        script = f"let a = await fetch('{path}', {{method: 'POST', body: {body}}}); return [a.status, await a.json()]"
        answer = page.run(script)
        assert (answer[0], answer[1]["type"]) == (status, kind)


def test_overload(page):
    """Six connections are the most that it makes."""
    script = """let all = [1, 2, 3, 4, 5, 6].map(n => fetch('/busy?s=0.5&n=' + n));
        return (await Promise.all(all)).map(a => [a.status, a.headers.get('retry-after')])"""
    answers = page.run(script)
    assert sorted(status for status, _ in answers) == [200, 200, 503, 503, 503, 503]
    assert all(wait is not None for status, wait in answers if status == 503)


def test_streams(page, service):
    name = uuid.uuid4().hex
    first = page.run(
        f"""let answer = await fetch('/web/stream?name={name}');
        window.reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
        return (await window.reader.read()).value"""
    )
    assert first == "first\n"
    note(service, name, "got it")
    assert page.run("return (await window.reader.read()).value") == "last\n"
    assert page.run("return (await window.reader.read()).done") is True


def test_aborts(page, service):
    stream, silence = uuid.uuid4().hex, uuid.uuid4().hex
    page.run(
        f"""window.abort = new AbortController();
        let answer = await fetch('/web/stream?name={stream}', {{signal: window.abort.signal}});
        await answer.body.getReader().read();
        window.silent = fetch('/web/silence?name={silence}', {{signal: window.abort.signal}}).catch(e => e.name);"""
    )
    wait_until(lambda: note(service, silence) == ["began"])
    assert page.run("window.abort.abort(); return await window.silent") == "AbortError"
    wait_until(lambda: note(service, stream) == ["ended"])
    wait_until(lambda: note(service, silence) == ["began", "cancelled"])


def test_pages_that_are_left(browser, page, service):
    name = uuid.uuid4().hex
    page.run(f"fetch('/web/silence?name={name}')")
    wait_until(lambda: note(service, name) == ["began"])
    browser.open(f"{service.url}/web/long")
    wait_until(lambda: note(service, name) == ["began", "cancelled"])


def test_event_source(page):
    """It comes back by itself, and says what it had last."""
    seen = page.run(
        """return await new Promise((done, failed) => {
            let seen = [], source = new EventSource('/web/events');
            setTimeout(() => failed(new Error(seen)), 20000);
            source.addEventListener('count', event => {
                seen.push(event.lastEventId + ' ' + event.data);
                if (seen.length == 7) { source.close(); done(seen); }
            });
        })"""
    )
    assert seen == [f"{number} {number}\nä" for number in range(1, 8)]


SOCKET = """
    let socket = new WebSocket('ws://' + location.host + '/web/socket?name=%s', ['one', 'two']);
    socket.binaryType = 'arraybuffer';
    let closed = new Promise(done => socket.onclose = event => done([event.code, event.reason, event.wasClean]));
    let next = () => new Promise(done => socket.onmessage = event => done(event.data));
    let opened = await new Promise(done => { socket.onopen = () => done(true); socket.onerror = () => done(false); });
"""


def test_websockets(page, service):
    name = uuid.uuid4().hex
    answers = page.run(
        SOCKET % name
        + """let answers = [opened, socket.protocol], message = next();
        socket.send('hällo ☃');
        answers.push(await message);
        message = next();
        socket.send(new Uint8Array(500000).fill(7, 0, 1));
        let bytes = new Uint8Array(await message);
        answers.push(bytes.length, bytes[0], bytes[bytes.length - 1]);
        socket.close(4001, 'enough');
        return [...answers, await closed];"""
    )
    assert answers == [True, "two", "HÄLLO ☃", 500_000, 0, 7, [4001, "enough", True]]
    wait_until(lambda: note(service, name) == [[4001, "enough"]])


def test_websockets_that_the_service_closes(page):
    assert page.run(SOCKET % "" + "socket.send('close 4321 see you ☃'); return await closed") == [
        4321,
        "see you ☃",
        True,
    ]
    code, _, _ = page.run(SOCKET % "" + f"socket.send(new Uint8Array({MESSAGE_LIMIT} + 1)); return await closed")
    assert code == 1009
    opened = page.run((SOCKET % "").replace("/web/", "/nowhere/") + "return [opened, (await closed)[0]]")
    assert opened == [False, 1006]


def test_websockets_of_pages_that_are_left(browser, page, service):
    name = uuid.uuid4().hex
    assert page.run(
        f"let socket = 0; {SOCKET.replace('let socket', 'socket') % name} window.kept = socket; return opened"
    )
    browser.open(f"{service.url}/web/long")
    wait_until(lambda: note(service, name))
    assert note(service, name)[0][0] in {1001, 1005, 1006}


# -- other origins: the service has middleware from here on ------------------------------------------------------------


@pytest.fixture(scope="module")
def stranger(browser: Browser, service: WebService) -> Browser:
    """A page of another origin, as far as browsers are concerned; the service lets it in."""
    cors = {
        "allow_origin_regex": r"http://localhost:\d+",
        "allow_methods": ["*"],
        "allow_headers": ["x-custom"],
        "expose_headers": ["x-request-id"],
    }
    service.start(
        middleware=["starlette.middleware.gzip:GZipMiddleware", ["starlette.middleware.cors:CORSMiddleware", cors]]
    )
    browser.open(f"{service.url.replace('127.0.0.1', 'localhost')}/web/page")
    return browser


def test_cors(stranger, service):
    script = "let a = await fetch('%s', %s); return [a.status, await a.text(), a.headers.get('x-request-id')]"
    status, text, request_id = stranger.run(script % (service.url + "/web/long", "{}"))
    assert (status, text) == (200, LONG)
    assert request_id
    # A method and a header that must be asked for first.
    options = "{method: 'PUT', body: 'x', headers: {'X-Custom': 'y', 'Content-Type': 'application/json'}}"
    status, text, _ = stranger.run(
        script % (service.url + "/web/echo", options.replace(", 'Content-Type': 'application/json'", ""))
    )
    told = json.loads(text)
    assert (status, told["method"], told["headers"]["x-custom"]) == (200, "PUT", "y")
    assert told["headers"]["origin"].startswith("http://localhost:")
    # Refusals too can be read.
    status, text, _ = stranger.run(script % (service.url + "/nowhere", "{}"))
    assert (status, json.loads(text)["type"]) == (404, "NotFound")
    # What was not allowed stays with the service.
    options = "{method: 'PUT', headers: {'X-Other': 'y'}}"
    refused = stranger.run(f"return await fetch('{service.url}/web/echo', {options}).catch(e => e.name)")
    assert refused == "TypeError"


def test_events_for_other_origins(stranger, service):
    data = stranger.run(
        f"""let source = new EventSource('{service.url}/web/events');
        let data = await new Promise(done => source.addEventListener('count', event => done(event.data)));
        source.close();
        return data"""
    )
    assert data == "1\nä"


def test_without_cors_other_origins_read_nothing(stranger, service):
    service.start(middleware=[])
    assert stranger.run(f"return await fetch('{service.url}/web/long').catch(e => e.name)") == "TypeError"
