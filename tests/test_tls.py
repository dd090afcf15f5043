"""A cluster with TLS on every connection, each process with a certificate of its own, started from the shell."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import ssl
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest
from certificates import Authority
from distributed import Client, Security
from distributed.utils_test import gen_cluster
from helpers import http_client, until, wait_until
from processes import Processes, free_port

import dask_serve as serve
from dask_serve.embedded import EmbeddedCluster
from dask_serve.exceptions import ConfigError, DeploymentUnavailableError, ServeError
from dask_serve.replica.listening import Place, TLSListener, bind, place_of
from dask_serve.routing.session import Session

#: Of the doors; below the ports that the kernel gives out.
FIRST, LAST = 19100, 19110


class Cluster(Processes):
    """A scheduler and two workers: on an interface, and behind a contact address; the second without uvloop."""

    def __init__(self, directory: Any) -> None:
        super().__init__(directory)
        self.authority = Authority(directory, "authority")
        self.stranger = Authority(directory, "stranger")
        self.port, worker_port = free_port(), free_port()
        self.address = f"tls://127.0.0.1:{self.port}"
        self.dask(
            *("scheduler", "scheduler", "--host", "127.0.0.1", "--protocol", "tls", "--port", str(self.port)),
            *("--dashboard-address", ":0", "--preload", "dask_serve.preload", "--serve-port", "0"),
            *self.authority.flags("scheduler"),
        )
        worker = ("worker", self.address, "--nthreads", "2", "--no-nanny", "--no-dashboard", "--memory-limit", "0")
        ports = {"DASK_SERVE__DOOR__PORT": f"{FIRST}:{LAST}"}
        self.dask("one", *worker, "--name", "one", "--interface", "lo", *self.authority.flags("one"), **ports)
        plain = directory / "plain"
        plain.mkdir()
        (plain / "uvloop.py").write_text("raise ImportError('not in this test')\n")
        ports["PYTHONPATH"] = f"{plain}{os.pathsep}{self.environment['PYTHONPATH']}"
        listen, contact = (f"tls://{host}:{worker_port}" for host in ("0.0.0.0", "127.0.0.2"))
        place = ("--listen-address", listen, "--contact-address", contact)
        self.dask("two", *worker, "--name", "two", *place, *self.authority.flags("two"), **ports)

    def variables(self) -> dict[str, str]:
        """The certificate of a client, as environment variables for Dask's configuration."""
        certificate, key = self.authority.issue("client")
        return {
            "DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION": "true",
            "DASK_DISTRIBUTED__COMM__TLS__CA_FILE": str(self.authority.path),
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT": str(certificate),
            "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY": str(key),
        }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("tls"))
    try:
        yield made
    finally:
        made.close()


@serve.deployment(num_replicas=2, max_replicas_per_worker=1)
class Model:
    def __call__(self, x: Any) -> Any:
        return x

    def where(self) -> str:
        return serve.get_replica_context().worker

    def count(self, n: int) -> Any:
        yield from range(n)


@serve.deployment(max_replicas_per_worker=1)
class Front:
    def __init__(self, model: Any) -> None:
        self.model = model

    async def __call__(self, request: Any) -> Any:
        return sorted({await self.model.where.remote() for _ in range(20)})

    def blocking(self, x: Any) -> Any:
        return self.model.remote(x).result()

    async def both(self) -> Any:
        return sorted({await self.model.where.remote() for _ in range(20)})


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    security = cluster.authority.security("client")
    with Client(cluster.address, security=security, timeout=30, set_as_default=False) as made:
        made.wait_for_workers(2, timeout=30)
        yield made


@pytest.fixture(scope="module")
def handle(client: Client) -> Any:
    return serve.run(Front.bind(Model.bind()), client=client, timeout=60)


def doors(client: Client) -> dict[str, str]:
    table = Session.of(client).table
    return {replica.worker: replica.door for entry in table.deployments.values() for replica in entry.replicas}


def test_every_way_of_calling(cluster, client, handle):
    model = serve.get_deployment_handle("Model", client=client)
    workers = sorted(client.scheduler_info()["workers"])
    assert {model.where.remote().result(10) for _ in range(40)} == set(workers)
    data = np.arange(2_000_000)
    assert (model.remote(data).result(10) == data).all()
    assert list(model.count.options(stream=True).remote(50)) == list(range(50))
    # Replica to replica, from a coroutine and from a thread.
    assert handle.both.remote().result(10) == workers
    assert handle.blocking.remote(3).result(10) == 3
    # From tasks, as arguments, and as Dask's own.
    assert client.submit(lambda h: h.blocking.remote(4).result(), handle).result(10) == 4
    assert model.remote(model.remote(data)).result(10).sum() == data.sum()
    assert client.submit(np.sum, model.remote(data)).result(10) == data.sum()
    # HTTP, through proxies that know no Dask.
    with http_client(serve.url(client=client)) as http:
        assert set(http.get("/").json()) <= set(workers)


def test_where_doors_listen(cluster, client, handle):
    """On the worker's interface, under its contact address, at a port of the range."""
    by_name = {info["name"]: address for address, info in client.scheduler_info()["workers"].items()}
    found = doors(client)
    assert re.fullmatch(r"tls://127\.0\.0\.1:\d+", found[by_name["one"]])
    assert re.fullmatch(r"tls://127\.0\.0\.2:\d+", found[by_name["two"]])
    ports = [int(door.rpartition(":")[2]) for door in found.values()]
    assert all(FIRST <= port <= LAST for port in ports)


def test_through_the_scheduler_only(cluster, client, handle):
    with Client(cluster.address, security=client.security, set_as_default=False) as other:
        for host in ("127.0.0.1", "127.0.0.2"):
            Session.of(other)._ways.note(host, tunnelled=True)
        model = serve.get_deployment_handle("Model", client=other)
        assert len({model.where.remote().result(10) for _ in range(40)}) == 2
        assert model.remote(b"x" * 3_000_000).result(10) == b"x" * 3_000_000


def test_commands_take_certificates_from_the_configuration(cluster, client, handle):
    """``dask serve proxy`` on another node, too."""
    variables = cluster.variables()
    cluster.serve("proxy", "proxy", "--scheduler", cluster.address, "--port", "0", **variables)
    [url] = wait_until(lambda: re.findall(r"serving at (\S+)", cluster.log("proxy")), 30)
    with http_client(url) as http:
        assert set(http.get("/").json()) <= set(client.scheduler_info()["workers"])
    cluster.serve("status", "status", "--scheduler", cluster.address, **variables).wait(30)
    assert "2/2" in cluster.log("status")
    assert cluster.end("proxy") == 0


def handshake(address: tuple[str, int], context: ssl.SSLContext | None) -> bytes:
    """Connect, and return what came before the end."""
    with contextlib.suppress(ssl.SSLError, ConnectionError), socket.create_connection(address, 5) as sock:
        if context is None:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            return sock.recv(100)
        with context.wrap_socket(sock) as secured:
            return secured.recv(100)
    return b""


def test_strangers_are_sent_away(cluster, client, handle):
    """Whoever has no certificate, or that of another authority, or speaks no TLS: the log has one line."""
    model = serve.get_deployment_handle("Model", client=client)
    by_name = {info["name"]: address for address, info in client.scheduler_info()["workers"].items()}
    for name in ("one", "two"):
        host, _, port = doors(client)[by_name[name]].removeprefix("tls://").partition(":")
        address = (host, int(port))
        naked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        naked.check_hostname, naked.verify_mode = False, ssl.CERT_NONE
        other = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        other.check_hostname, other.verify_mode = False, ssl.CERT_NONE
        other.load_cert_chain(*cluster.stranger.issue("stranger"))
        before = cluster.log(name).count("were sent away")
        for _ in range(3):
            for context in (naked, other, None):
                assert handshake(address, context) == b""
        said = wait_until(lambda n=name, b=before: cluster.log(n).count("were sent away") > b and cluster.log(n))
        assert said.count("were sent away") == before + 1
        assert "sent away: 1; the last one, 127.0.0.1: peer did not return a certificate" in said
        assert "Traceback" not in said
        # Somebody who says nothing keeps nobody waiting.
        with socket.create_connection(address, 5):
            assert model.remote(5).result(10) == 5


def test_the_listener_on_other_loops(tmp_path):
    """The same with asyncio's loop and with uvloop's; a caller that leaves within the handshake is nothing."""
    authority = Authority(tmp_path, "authority")
    security = authority.security("both", ("client", "worker"))
    server = security.get_listen_args("worker")["ssl_context"]
    caller = security.get_connection_args("client")["ssl_context"]
    makers = [asyncio.new_event_loop]
    with pytest.MonkeyPatch.context():
        try:
            import uvloop
        except ImportError:  # pragma: no cover
            pass
        else:
            makers.append(uvloop.new_event_loop)

    class Echo(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            self.transport.write(data)

    async def scenario() -> None:
        sock = bind(Place())
        host, port = sock.getsockname()
        listener = TLSListener(sock, Echo, server)
        for _ in range(2):
            socket.create_connection((host, port)).close()
            reader, writer = await asyncio.open_connection(host, port, ssl=caller, server_hostname="")
            writer.write(b"hello")
            assert await asyncio.wait_for(reader.readexactly(5), 5) == b"hello"
            nodelay = writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert nodelay
            writer.close()
        listener.close()
        await until(lambda: sock.fileno() == -1)
        with pytest.raises(OSError, match=r"."):
            await asyncio.open_connection(host, port)

    for maker in makers:
        loop = maker()
        try:
            loop.run_until_complete(scenario())
        finally:
            loop.close()


@gen_cluster(client=True, scheduler="tls://127.0.0.1", nthreads=[("tls://127.0.0.1", 2)], security=Security.temporary())
async def test_certificates_that_do_not_fit_are_told_at_the_handle(c, s, a):
    """As when those of one side have expired; a call that nobody can answer does not wait for ever."""
    handle = await serve.run(Model.options(num_replicas=1).bind(), route_prefix=None, client=c)
    assert await handle.remote(1) == 1
    stranger = Security.temporary().get_connection_args("client")["ssl_context"]
    nobody = Security.temporary().get_connection_args("client")["ssl_context"]
    nobody.verify_mode = ssl.CERT_NONE
    for context, said in (
        (stranger, "this process does not take the door's certificate: certificate verify failed: self-signed"),
        (nobody, "closed the connection without a word: it does not take this certificate"),
        (None, "the door has TLS, and this process has no certificate"),
    ):
        async with Client(s.address, security=c.security, asynchronous=True, set_as_default=False) as other:
            session = Session.of(other)
            session._ssl, session._ways.tunnel = context, None
            theirs = await serve.get_deployment_handle("Model", client=other)
            with pytest.raises(DeploymentUnavailableError, match=said) as caught:
                await theirs.remote(1).result(10)
            assert "certificates of one authority" in str(caught.value)
    # Through the scheduler there is a way, as Dask's own certificates are in order.
    async with Client(s.address, security=c.security, asynchronous=True, set_as_default=False) as other:
        Session.of(other)._ssl = stranger
        theirs = await serve.get_deployment_handle("Model", client=other)
        assert await theirs.remote(2).result(10) == 2


@pytest.mark.parametrize("setting", [{"require-encryption": True}, {"default-scheme": "tls"}])
def test_the_embedded_cluster_has_no_tls(setting):
    with dask.config.set({f"distributed.comm.{name}": value for name, value in setting.items()}):
        with pytest.raises(ConfigError, match=rf"no TLS, .* asks for it \(distributed\.comm\.{next(iter(setting))}\)"):
            EmbeddedCluster.start(n_workers=1, dashboard_address=None)


# -- places


def worker(listen: str, contact: str) -> Any:
    return SimpleNamespace(address=contact, listen_address=listen)


@pytest.mark.parametrize(
    ("listen", "contact", "hosts", "shown"),
    [
        ("tcp://10.0.0.7:4000", "tcp://10.0.0.7:4000", ("10.0.0.7",), "10.0.0.7"),
        ("tcp://0.0.0.0:4000", "tcp://10.0.0.7:4000", ("10.0.0.7", ""), "10.0.0.7"),
        ("tls://0.0.0.0:4000", "tls://worker.example:4000", ("worker.example", ""), "worker.example"),
        ("tls://10.0.0.7:4000", "tls://192.0.2.1:4000", ("10.0.0.7",), "192.0.2.1"),
        ("tcp://[::]:4000", "tcp://[fd00::7]:4000", ("fd00::7", ""), "fd00::7"),
        ("inproc://10.0.0.7/1/2", "inproc://10.0.0.7/1/2", ("127.0.0.1",), "127.0.0.1"),
    ],
)
def test_places(listen, contact, hosts, shown):
    with dask.config.set({"serve.door.port": 9100}):
        assert place_of(worker(listen, contact)) == (hosts, shown, [9100])


@pytest.mark.parametrize("wrong", ["a", "9110:9100", 70000, -1, "9100:", [""]])
def test_ports_that_are_none(wrong):
    with (
        dask.config.set({"serve.door.port": wrong}),
        pytest.raises(ConfigError, match=r"serve\.door\.port = .* is no port"),
    ):
        place_of(worker("tcp://10.0.0.7:1", "tcp://10.0.0.7:1"))


def test_ports_are_taken_in_turn():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"127\.0\.0\.1: all of the ports {port} to {port} \(serve\.door\.port\)"):
            bind(Place(ports=(port,)))
        with bind(Place(ports=(port, 0))) as found:
            assert found.getsockname()[0] == "127.0.0.1"
    # An address that this machine does not have (RFC 5737), and one that it has.
    with pytest.raises(ServeError, match=r"on 192\.0\.2\.1, port 0: "):
        bind(Place(("192.0.2.1",)))
    with bind(Place(("192.0.2.1", ""))) as found, socket.create_connection(("127.0.0.1", found.getsockname()[1])):
        pass


@gen_cluster(client=True, nthreads=[("127.0.0.1", 2)])
async def test_no_port_for_a_door_is_told(c, s, a):
    with socket.create_server(("127.0.0.1", 0)) as taken, dask.config.set({"serve.door.port": taken.getsockname()[1]}):
        with pytest.raises(ServeError, match=r"serve\.door\.port\) are in use") as caught:
            await serve.run(Model.options(num_replicas=1).bind(), route_prefix=None, client=c)
        assert "make the range larger" in str(caught.value)
        assert not [t for t in __import__("threading").enumerate() if t.name == "dask-serve-door"]
