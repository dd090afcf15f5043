"""Which cluster a command means, and the client of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .messages import Failure, Misused

if TYPE_CHECKING:
    from distributed import Client
    from distributed.security import Security

__all__ = ["CONNECT_WITHIN", "Cluster", "cluster_options"]

#: Seconds within which a scheduler must answer; within which its port must be open, for it may be about to start.
CONNECT_WITHIN, OPEN_WITHIN = 10.0, 3.0

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The cluster that the options of a command name."""

    scheduler: str | None = None
    scheduler_file: str | None = None
    tls_ca_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    def find(self) -> str | None:
        """Return the scheduler's address: as given, of the file, or of Dask's configuration; None: there is none."""
        import dask

        if self.scheduler and self.scheduler_file:
            raise Misused("--scheduler and --scheduler-file name two clusters", "give one of them")
        if self.scheduler_file:
            return self._read(self.scheduler_file)
        return self.scheduler or dask.config.get("scheduler-address", None)

    @property
    def address(self) -> str:
        """The scheduler's address.

        Raises
        ------
        Misused
            No option names one, nor does Dask's configuration.
        """
        found = self.find()
        if found is None:
            raise Misused(
                "which cluster? No scheduler is named",
                "give --scheduler ADDRESS or --scheduler-file PATH, or set DASK_SCHEDULER_ADDRESS",
            )
        return found

    @property
    def security(self) -> Security | None:
        """Dask's certificates, where options name them; None: those of its configuration."""
        given = {"tls_ca_file": self.tls_ca_file, "tls_client_cert": self.tls_cert, "tls_client_key": self.tls_key}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return None
        from distributed.security import Security

        return Security(**given)

    def connect(self) -> Client:
        """Return a client, which the caller closes.

        Raises
        ------
        Failure
            No scheduler answers.
        """
        from distributed import Client

        address = self.greet()
        return Client(address, timeout=CONNECT_WITHIN, security=self.security, set_as_default=False)

    def greet(self) -> str:
        """Return the address of a scheduler that answers.

        Raises
        ------
        Failure
            None does.
        """
        address = self.address
        _check(address)
        _greet(address, self.security)
        return address

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """Connect, for as long as the block runs.

        What the scheduler says and cannot be understood is a matter of versions.
        """
        import msgspec

        with self.connect() as client:
            try:
                yield client
            except msgspec.DecodeError as error:
                raise _other_version(client, error) from error

    @staticmethod
    def _read(path: str) -> str:
        import json
        from pathlib import Path

        try:
            return str(json.loads(Path(path).read_text(encoding="utf-8"))["address"])
        except OSError as error:
            raise Failure(
                f"the scheduler file {path} cannot be read: {error.strerror or error}",
                f"`dask scheduler --scheduler-file {path}` writes it; is the directory shared with this node?",
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise Failure(
                f"{path} is no scheduler file: it holds no address",
                f"`dask scheduler --scheduler-file {path}` writes one",
            ) from error


def _first_line(error: Exception) -> str:
    kind = type(error).__name__
    return next((line if " " in line else f"{kind}: {line}" for line in str(error).strip().splitlines()), kind)


def _check(address: str) -> None:
    """Raise Failure where an address cannot be one: a client would go on trying."""
    from distributed.comm.addressing import parse_address, parse_host_port
    from distributed.comm.registry import get_backend

    try:
        scheme, location = parse_address(address)
        get_backend(scheme)
        if scheme != "inproc":
            parse_host_port(location)
    except ValueError as error:
        raise Failure(
            f"{address} is no address of a scheduler ({_first_line(error)})",
            "one is like tcp://HOST:8786, or tls://HOST:8786 where there are certificates",
        ) from error


def _greet(address: str, security: Security | None) -> None:
    """Raise Failure where no scheduler answers: a client would take half a minute, and not say why."""
    import asyncio

    from distributed.comm.addressing import normalize_address, parse_address, parse_host_port
    from distributed.security import Security

    security = security or Security()
    try:
        arguments = security.get_connection_args("client")
    except OSError as error:
        raise Failure(f"the certificates of this client cannot be used: {_unusable(security, error)}", _FILES) from None
    scheme, location = parse_address(normalize_address(address))
    if scheme == "tls" and arguments.get("ssl_context") is None:
        raise Failure(f"{address} wants certificates, and none are named", _CERTIFICATES)
    if scheme in ("tcp", "tls"):
        host, port = parse_host_port(location, 8786)
        _await_port(address, f"tcp://{host}:{port}")
        try:
            asyncio.run(_identify(address, arguments))
        except Exception as error:
            repair = _CERTIFICATES if scheme == "tls" else _PLAIN
            raise Failure(
                f"what listens at {address} does not answer as a Dask scheduler ({_first_line(error)})", repair
            ) from error


def _unusable(security: Security, error: OSError) -> str:
    """Say which file of certificates is not as it should be: ssl does not."""
    from pathlib import Path

    for option, name in _CERTIFICATE_FILES.items():
        path = getattr(security, name)
        if path and "\n" not in path:
            try:
                Path(path).read_bytes()
            except OSError as unreadable:
                return f"{path} ({option}) cannot be read: {unreadable.strerror}"
    return error.strerror or str(error)


def _await_port(address: str, port: str) -> None:
    import asyncio
    import time

    from ..checkup import knock

    deadline = time.monotonic() + OPEN_WITHIN
    while why := asyncio.run(knock(port)):
        if time.monotonic() > deadline:
            raise Failure(
                f"no scheduler answers at {address}: {why}",
                "is it running (`dask scheduler`), and is this the address that it logs?",
            )
        time.sleep(0.2)


async def _identify(address: str, arguments: dict[str, Any]) -> None:
    import asyncio

    from distributed.core import rpc

    scheduler = rpc(address, connection_args=arguments, timeout=CONNECT_WITHIN)
    try:
        await asyncio.wait_for(scheduler.identity(), CONNECT_WITHIN)
    finally:
        await scheduler.close_rpc()


_PLAIN = "is this the address that it logs, and not its dashboard's? One with certificates has an address with tls://"
_CERTIFICATE_FILES = {"--tls-ca-file": "tls_ca_file", "--tls-cert": "tls_client_cert", "--tls-key": "tls_client_key"}
_FILES = "--tls-ca-file, --tls-cert and --tls-key, or distributed.comm.tls of Dask's configuration, name files in PEM"
_CERTIFICATES = "give --tls-ca-file, --tls-cert and --tls-key, of an authority that the scheduler trusts"


def _other_version(client: Client, error: Exception) -> Failure:
    from .. import __version__
    from ..session.peers import probe

    address = client.scheduler.address
    try:
        answer = client.sync(probe, client.scheduler, "serve_checkup")
        theirs = f"has dask_serve {answer['facts']['versions']['dask_serve']}"
    except (OSError, TypeError, KeyError):
        theirs = "has another version of dask_serve"
    return Failure(
        f"the scheduler at {address} {theirs}, which {__version__} here does not understand ({error})",
        "use the same version in both; `dask serve doctor` tells what each process has",
    )


def cluster_options(function: Function) -> Function:
    """Add the options that name a cluster; the function gets them as one argument, ``cluster``."""

    @functools.wraps(function)
    def with_cluster(**options: Any) -> Any:
        fields = {field.name: options.pop(field.name) for field in dataclasses.fields(Cluster)}
        return function(cluster=Cluster(**fields), **options)

    for option in reversed(_OPTIONS):
        with_cluster = option(with_cluster)
    return with_cluster  # type: ignore[return-value]


_PATH = click.Path(dir_okay=False)
_OPTIONS = (
    click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Address of a running scheduler, e.g. tcp://127.0.0.1:8786. Unless set: DASK_SCHEDULER_ADDRESS, or "
        "scheduler-address of Dask's configuration.",
    ),
    click.option("--scheduler-file", metavar="PATH", type=_PATH, help="File that the scheduler wrote its address to."),
    click.option("--tls-ca-file", metavar="PATH", type=_PATH, help="Certificates that the scheduler's must be from."),
    click.option("--tls-cert", metavar="PATH", type=_PATH, help="Certificate of this client."),
    click.option("--tls-key", metavar="PATH", type=_PATH, help="Key of that certificate."),
)
