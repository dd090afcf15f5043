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

#: Seconds within which a scheduler must answer.
CONNECT_WITHIN = 10.0

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

        address = self.address
        _check(address)
        try:
            return Client(address, timeout=CONNECT_WITHIN, security=self.security, set_as_default=False)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise Failure(f"no scheduler answers at {address} ({_first_line(error)})", _repair(address)) from error

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        """Connect, for as long as the block runs."""
        with self.connect() as client:
            yield client

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
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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


def _repair(address: str) -> str:
    hint = "; tls:// needs --tls-ca-file, --tls-cert and --tls-key" if address.startswith("tls://") else ""
    return f"is it running (`dask scheduler`), and is this the address that it logs?{hint}"


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
