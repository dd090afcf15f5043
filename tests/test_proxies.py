"""Proxy processes and their supervisor: real processes, real sockets, killed under load."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from helpers import until

import dask_serve
from dask_serve.config import HTTPOptions
from dask_serve.controller import elsewhere, process, proxies, sockets
from dask_serve.controller.status import ProxyStatus
from dask_serve.exceptions import ConfigError, ServeError

ROOT = Path(dask_serve.__file__).parents[1]
GET = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"

#: A proxy process with an application of its own: "/" answers with pid and table, "/hold" after half a second.
CHILD = """
import asyncio, os, socket, sys
from dask_serve.proxy.__main__ import Service, run

table = b""

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": kind + ".complete"})
            if kind.endswith("shutdown"):
                return
    if scope["path"] != "/":
        open(sys.argv[0] + scope["path"].replace("/", "."), "w").close()
        await asyncio.sleep(0.5 if scope["path"] == "/hold" else 1000)
    sock = scope["dask_serve.connection"].transport.get_extra_info("socket")
    nodelay = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    body = b"%d %s %d %s" % (os.getpid(), table, bool(nodelay), str(options.request_timeout_s).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

def build(given, presence, doors):
    global options
    options = given
    return Service(app, apply, close)

def apply(encoded):
    global table
    table = encoded

async def close():
    pass

run(int(sys.argv[1]), int(sys.argv[2]), build)
"""


@pytest.fixture
def command(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    return [sys.executable, str(script)]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 60))


@contextlib.asynccontextmanager
async def supervised(command, table=b"first", **options):
    events = []
    supervisor = proxies.Proxies(lambda *event: events.append(event), command=command)
    supervisor.events = events
    if table is not None:
        supervisor.publish(table)
    try:
        await supervisor.start(HTTPOptions(**{"port": 0, "drain_timeout_s": 5, **options}))
        yield supervisor
    finally:
        await supervisor.stop(5)


def entered(command, path):
    """Return whether a request to ``path`` runs, or ran, in a process of ``command``."""
    return Path(command[-1] + path.replace("/", ".")).exists()


def port_of(url):
    return int(url.rsplit(":", 1)[1])


def pids(supervisor):
    return [row["pid"] for row in supervisor.describe() if row["state"] == "ready"]


async def read_answer(reader):
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
    return await reader.readexactly(length), b"connection: close" in head


async def get(url, path=b"/"):
    """Return pid, table, whether TCP_NODELAY is set, and the request time-out of the proxy that answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(url))
    writer.write(GET % path)
    body, _ = await asyncio.wait_for(read_answer(reader), 10)
    writer.close()
    pid, table, nodelay, timeout = body.split(b" ")
    return int(pid), table, nodelay == b"1", float(timeout)


class Load:
    """Clients with connections that they keep open, as wrk has them; counts what failed."""

    def __init__(self, url, connections):
        self.port = port_of(url)
        self.answered = 0
        self.failed = []
        self._stop = False
        self._clients = [asyncio.ensure_future(self._client()) for _ in range(connections)]

    async def _client(self):
        while not self._stop:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError as error:
                self.failed.append(("connect", error))
                return
            closing = False
            try:
                while not closing and not self._stop:
                    writer.write(GET % b"/")
                    _, closing = await read_answer(reader)
                    self.answered += 1
            except (OSError, asyncio.IncompleteReadError) as error:
                self.failed.append(("read", error))
            finally:
                writer.close()

    async def goes_on(self, count):
        wanted = self.answered + count
        await until(lambda: self.answered >= wanted)

    async def stop(self):
        self._stop = True
        await asyncio.wait_for(asyncio.gather(*self._clients), 10)


async def end_one(supervisor, number):
    """Send a signal to one proxy and wait for its successor."""
    count, victim = len(pids(supervisor)), pids(supervisor)[0]
    os.kill(victim, number)
    await until(lambda: len(pids(supervisor)) == count and victim not in pids(supervisor))


def can_connect(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return False


# --- The life of the processes


def test_start_describe_stop(command):
    async def main():
        async with supervised(command, num_proxies=2) as supervisor:
            rows = supervisor.describe()
            assert [(row["slot"], row["state"], row["restarts"]) for row in rows] == [(0, "ready", 0), (1, "ready", 0)]
            pid, table, nodelay, _ = await get(supervisor.url)
            assert pid in pids(supervisor)
            assert (table, nodelay) == (b"first", True)
            supervisor.publish(b"second")
            seen = set()
            deadline = time.monotonic() + 5
            while len(seen) < 2:  # both of them get it
                assert time.monotonic() < deadline
                pid, table, *_ = await get(supervisor.url)
                seen |= {pid} if table == b"second" else set()
            ended, port = pids(supervisor), port_of(supervisor.url)
            assert await supervisor.start(HTTPOptions(port=0), set()) == supervisor.url
            assert pids(supervisor) == ended
        assert (supervisor.url, supervisor.describe()) == ("", [])
        assert not any(alive(pid) for pid in ended)
        assert not can_connect(port)
        assert {event for _, event, _ in supervisor.events} == {"ready", "stats", "exited"}
        assert [details["code"] for _, event, details in supervisor.events if event == "exited"] == [0, 0]
        await supervisor.stop()

    run(main())


def test_a_proxy_is_ready_only_with_a_table(command):
    async def main():
        supervisor = proxies.Proxies(command=command)
        starting = asyncio.ensure_future(supervisor.start(HTTPOptions(port=0)))
        await until(lambda: supervisor.describe() and supervisor.describe()[0]["pid"])
        assert not starting.done()
        supervisor.publish(b"table")
        assert (await get(await starting))[1] == b"table"
        await supervisor.stop(5)

    run(main())


def test_kill_9_refuses_no_connection(command):
    async def main():
        async with supervised(command) as supervisor:
            (pid,) = pids(supervisor)
            os.kill(pid, signal.SIGKILL)
            # All of these are made while nobody accepts, or at once after.
            answers = await asyncio.gather(*(get(supervisor.url) for _ in range(50)))
            assert {answer[:2] for answer in answers} == {(pids(supervisor)[0], b"first")}
            assert pids(supervisor) != [pid]
            assert supervisor.describe()[0]["restarts"] == 1

    run(main())


def test_kill_9_under_load_fails_only_what_was_in_flight(command):
    async def main():
        async with supervised(command, num_proxies=2) as supervisor:
            load = Load(supervisor.url, 16)
            await load.goes_on(200)
            await end_one(supervisor, signal.SIGKILL)
            await load.goes_on(200)
            await load.stop()
            assert len(load.failed) <= 16
            assert {kind for kind, _ in load.failed} <= {"read"}

    run(main())


def test_sigterm_of_one_of_two_under_load_fails_nothing(command):
    async def main():
        async with supervised(command, num_proxies=2) as supervisor:
            load = Load(supervisor.url, 32)
            for _ in range(2):
                await load.goes_on(300)
                await end_one(supervisor, signal.SIGTERM)
            await load.goes_on(300)
            await load.stop()
            assert load.failed == []
            codes = [details["code"] for _, event, details in supervisor.events if event == "exited"]
            assert codes == [0, 0]

    run(main())


def test_sigint_is_ignored(command):
    async def main():
        async with supervised(command) as supervisor:
            (pid,) = pids(supervisor)
            os.kill(pid, signal.SIGINT)
            assert (await get(supervisor.url, b"/hold"))[0] == pid

    run(main())


def test_a_successor_serves_while_the_old_process_drains(command):
    async def main():
        async with supervised(command, drain_timeout_s=3) as supervisor:
            (pid,) = pids(supervisor)
            slow = asyncio.ensure_future(get(supervisor.url, b"/forever"))
            await until(lambda: entered(command, "/forever"))
            os.kill(pid, signal.SIGTERM)
            await until(lambda: "draining" in {row["state"] for row in supervisor.describe()})
            assert (await get(supervisor.url))[0] != pid
            assert sorted(row["state"] for row in supervisor.describe()) == ["draining", "ready"]
            slow.cancel()
            await asyncio.gather(slow, return_exceptions=True)
            await until(lambda: not alive(pid))

    run(main())


def test_stop_finishes_requests_in_flight_and_cuts_off_endless_ones(command):
    async def main():
        async with supervised(command) as supervisor:
            url, (pid,) = supervisor.url, pids(supervisor)
            slow = asyncio.ensure_future(get(url, b"/hold"))
            await until(lambda: entered(command, "/hold"))
            await supervisor.stop(5)
            assert (await slow)[0] == pid
        async with supervised(command, drain_timeout_s=0.2) as supervisor:
            endless = asyncio.ensure_future(get(supervisor.url, b"/forever"))
            await until(lambda: entered(command, "/forever"))
            await supervisor.stop()
            with pytest.raises((OSError, asyncio.IncompleteReadError, IndexError, ValueError)):
                await endless

    run(main())


def test_a_process_that_does_not_answer_is_killed(command, monkeypatch):
    monkeypatch.setattr(process, "EXIT_GRACE", 0.3)

    async def main():
        async with supervised(command) as supervisor:
            (pid,) = pids(supervisor)
            os.kill(pid, signal.SIGSTOP)
            await supervisor.stop(0.1)
            assert not alive(pid)

    run(main())


def test_a_process_that_cannot_start_is_an_error(tmp_path):
    async def main():
        supervisor = proxies.Proxies(command=[sys.executable, "-c", "raise SystemExit('no such module')"])
        supervisor.publish(b"")
        with pytest.raises(ServeError, match="exited 3 times while it started"):
            await supervisor.start(HTTPOptions(port=0))
        assert supervisor.describe() == []
        supervisor = proxies.Proxies(command=[str(tmp_path / "nothing")])
        with pytest.raises(ServeError, match="exited 3 times"):
            await supervisor.start(HTTPOptions(port=0))

    run(main())


def test_proxies_end_when_their_controller_is_killed(tmp_path, command):
    script = tmp_path / "controller.py"
    script.write_text(
        textwrap.dedent(f"""
        import asyncio
        from dask_serve.config import HTTPOptions
        from dask_serve.controller.proxies import Proxies

        async def main():
            supervisor = Proxies(command={command!r})
            supervisor.publish(b"")
            print(await supervisor.start(HTTPOptions(port=0, num_proxies=2)), flush=True)
            print(*[row["pid"] for row in supervisor.describe()], flush=True)
            await asyncio.sleep(1000)

        asyncio.run(main())
        """)
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    controller = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=env)
    try:
        url = controller.stdout.readline().strip()
        started = [int(pid) for pid in controller.stdout.readline().split()]
        assert len(started) == 2

        async def main():
            slow = asyncio.ensure_future(get(url, b"/hold"))
            await until(lambda: entered(command, "/hold"))
            controller.kill()
            # The port is free at once, for the next controller, while requests in flight are finished.
            for sock in await sockets.bind_slots("127.0.0.1", port_of(url), 1, retry=5):
                sock.close()
            assert (await slow)[0] in started
            await until(lambda: not any(alive(pid) for pid in started))

        run(main())
    finally:
        controller.kill()
        controller.wait()
        controller.stdout.close()


# --- Changes of a running service


def test_options_change_without_a_failed_request(command):
    async def main():
        async with supervised(command) as supervisor:
            url, old = supervisor.url, pids(supervisor)
            load = Load(url, 8)
            await supervisor.start(HTTPOptions(num_proxies=3), {"num_proxies"})
            assert len(pids(supervisor)) == 3
            assert set(old) < set(pids(supervisor))
            await supervisor.start(HTTPOptions(request_timeout_s=7), {"request_timeout_s"})
            assert len(pids(supervisor)) == 3
            assert not set(old) & set(pids(supervisor))
            assert supervisor.options.num_proxies == 3
            assert (await get(url))[3] == 7
            await load.stop()
            assert load.failed == []
            await supervisor.start(HTTPOptions(num_proxies=1), {"num_proxies"})
            assert len(supervisor.describe()) == 1
            assert supervisor.url == url
            assert supervisor.describe()[0]["restarts"] == 0

    run(main())


def test_moving_to_another_port_and_host(command):
    async def main():
        async with supervised(command) as supervisor:
            old = port_of(supervisor.url)
            with socket.create_server(("127.0.0.1", 0)) as taken:
                busy = taken.getsockname()[1]
                with pytest.raises(ConfigError, match=str(busy)):
                    await supervisor.start(HTTPOptions(port=busy), {"port"})
            assert port_of(supervisor.url) == old
            assert (await get(supervisor.url))[1] == b"first"
            with socket.create_server(("127.0.0.1", 0)) as sock:
                free = sock.getsockname()[1]
            assert port_of(await supervisor.start(HTTPOptions(port=free), {"port"})) == free
            assert not can_connect(old)
            url = await supervisor.start(HTTPOptions(host="0.0.0.0"), {"host"})
            assert url == f"http://127.0.0.1:{free}"
            assert (await get(url))[1] == b"first"
            with pytest.raises(ConfigError, match="not an address of this machine"):
                await supervisor.start(HTTPOptions(host="192.0.2.1"), {"host"})
            assert (await get(supervisor.url))[1] == b"first"

    run(main())


def test_the_file_of_a_unix_socket_goes_with_it(command, tmp_path, monkeypatch):
    """Also when the port is the default one, which is found as it is bound."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        monkeypatch.setattr(sockets, "DEFAULT_PORT", sock.getsockname()[1])
    path = tmp_path / "socket"

    async def main():
        async with supervised(command, unix_socket=str(path), port=None) as supervisor:
            assert supervisor.url == f"unix:{path}"
            assert path.exists()
            url = await supervisor.start(HTTPOptions(), {"unix_socket"})
            assert (await get(url))[1] == b"first"
            assert not path.exists()

    run(main())


# --- Ports


@pytest.mark.parametrize("share", [False, True])
def test_a_busy_explicit_port_is_an_error_even_if_its_owner_shares(share):
    with socket.socket() as other:
        if share:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} on 127.0.0.1 is in use.*serve.start\(port=...\)"):
            run(sockets.bind_slots("127.0.0.1", port, 1))


def test_a_busy_default_port_gives_the_next_one_and_a_warning(monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as other:
        busy = other.getsockname()[1]
        monkeypatch.setattr(sockets, "DEFAULT_PORT", busy)
        with caplog.at_level(logging.WARNING):
            slots = run(sockets.bind_slots("127.0.0.1", None, 2))
        ports = {sock.getsockname()[1] for sock in slots}
        assert len(slots) == 2
        assert len(ports) == 1
        (port,) = ports
        assert busy < port < busy + sockets.PORTS_TRIED
        assert f"Port {busy} is in use; HTTP is served on port {port} instead" in caplog.text
        for sock in slots:
            sock.close()


def test_services_that_start_together_do_not_share_a_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = threading.Barrier(4)

    def claim(_):
        together.wait()
        try:
            return sockets._probe_and_listen(socket.AF_INET, "127.0.0.1", port)
        except OSError:
            return None

    with ThreadPoolExecutor(4) as pool:
        for _ in range(200):
            claimed = [sock for sock in pool.map(claim, range(4)) if sock is not None]
            for sock in claimed:
                sock.close()
            assert len(claimed) <= 1


def test_a_port_that_becomes_free_is_waited_for():
    async def main():
        other = socket.create_server(("127.0.0.1", 0))
        port = other.getsockname()[1]
        asyncio.get_running_loop().call_later(0.3, other.close)
        (sock,) = await sockets.bind_slots("127.0.0.1", port, 1, retry=5)
        assert sock.getsockname()[1] == port
        sock.close()

    run(main())


def test_hosts():
    async def main():
        with pytest.raises(ConfigError, match="cannot resolve host"):
            await sockets.bind_slots("no such host", 0, 1)
        for host, shown in (("", "127.0.0.1"), ("localhost", "localhost"), ("0.0.0.0", "127.0.0.1")):
            (sock,) = await sockets.bind_slots(host, 0, 1)
            assert sockets.format_url(host, sock) == f"http://{shown}:{sock.getsockname()[1]}"
            sock.close()

    run(main())


# --- Imports


def python(code):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def test_a_proxy_imports_neither_dask_nor_distributed():
    modules = ["dask_serve", "dask_serve.proxy.__main__"]
    if (ROOT / "dask_serve/proxy/app.py").exists():
        modules += ["dask_serve.proxy.app", "dask_serve.routing.fabric"]
    done = python(
        f"import sys, {', '.join(modules)}\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('dask', 'distributed', 'tornado', 'numpy')])"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_decorator_is_not_hidden_by_the_submodule_of_its_name():
    done = python(
        "import dask_serve as serve, dask_serve.deployment, sys\n"
        "from dask_serve import deployment\n"
        "module = sys.modules['dask_serve.deployment']\n"
        "assert serve.deployment is deployment is module.deployment\n"
        "assert serve.Deployment is module.Deployment"
    )
    assert done.returncode == 0, done.stderr


def test_every_public_name_has_a_home():
    homes = {*dask_serve._HOME, *dask_serve._PARTS, *dask_serve.exceptions.__all__, "__version__"}
    assert homes == set(dask_serve.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dask_serve.nonsense
    assert "run" in dir(dask_serve)


def test_the_process_refuses_to_be_run_by_hand():
    done = subprocess.run(
        [sys.executable, "-m", "dask_serve.proxy"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "by the controller only" in done.stderr


def test_options_survive_the_lifeline():
    options = HTTPOptions(port=1, num_proxies=3)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(options), type=HTTPOptions) == options


def test_nodes_that_fall_silent_are_forgotten(monkeypatch):
    monkeypatch.setattr(elsewhere, "SILENT_AFTER", 0.1)

    async def main():
        changes = []
        nodes = elsewhere.Elsewhere(lambda: changes.append(list(nodes.rows)))
        one, other = ProxyStatus(url="http://one"), ProxyStatus(url="http://other")
        nodes.heard("one", [one])
        nodes.heard("one", [one])
        nodes.heard("other", [other])
        nodes.heard("one", [])
        nodes.heard("one", [])
        assert changes == [[one], [one, other], [other]]
        deadline = time.monotonic() + 5
        while nodes.rows:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert changes[3:] == [[]]
        nodes.heard("one", [one])
        nodes.close()
        assert nodes.rows == []

    asyncio.run(main())
