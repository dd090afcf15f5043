"""What a command says when something is wrong: what and where in the first line, what to do in the second.

The exit code is 2 for a command that was not written as it should be, and 1 for one that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, Any

import click

__all__ = ["Failure", "Misused", "Misuses", "command"]


class Failure(click.ClickException):
    """A command failed; the exit code is 1.

    Parameters
    ----------
    what : str
        What is wrong, and where.
    repair : str, optional
        What to do.
    """

    def __init__(self, what: str, repair: str = "") -> None:
        super().__init__(f"{what}\n{repair}" if repair else what)


class Misused(click.UsageError):
    """A command was not written as it should be; the exit code is 2.

    Parameters
    ----------
    what : str
        What is wrong.
    repair : str, optional
        What to write; by default, where help is.
    context : click.Context, optional
        Of the command.
    """

    def __init__(self, what: str, repair: str = "", context: click.Context | None = None) -> None:
        super().__init__(what, context)
        self.repair = repair

    def show(self, file: IO[Any] | None = None) -> None:
        path = self.ctx.command_path if self.ctx is not None else "dask serve"
        repair = self.repair or f"`{path} --help` tells what it takes"
        click.echo(f"Error: {self.format_message()}\n{repair}", file=file, err=True)


class Misuses:
    """Of a command or group: what click finds wrong is told as everything else is."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the arguments apart."""
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc, no-any-return]
        except (Misused, click.exceptions.NoArgsIsHelpError):
            raise
        except click.UsageError as error:
            raise Misused(error.format_message(), "", error.ctx or ctx) from None


class _Command(Misuses, click.Command):
    """A command whose errors are messages; ``--debug`` shows where they come from."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.params.append(
            click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")
        )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if isinstance(error, Misused):
                error.ctx = error.ctx or ctx
                raise
            raise Misused(error.format_message(), "", error.ctx or ctx) from None
        except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a message
            if _is_debugging(ctx) and not isinstance(error, click.exceptions.Exit | click.Abort):
                _show_traceback()
            raise _told(error) from None


def _is_debugging(ctx: click.Context) -> bool:
    return bool(ctx.params.get("debug"))


def _show_traceback() -> None:
    import traceback

    click.echo(traceback.format_exc().rstrip(), err=True)


def _told(error: Exception) -> Exception:
    """Return the exception that click prints as one message."""
    if isinstance(error, click.ClickException | click.exceptions.Exit | click.Abort):
        return error
    from ..exceptions import ServeError

    if isinstance(error, ServeError):
        return Failure(str(error))
    return Failure(f"{type(error).__name__}: {error}", "--debug shows where it comes from")


def command(*examples: str, **attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command of ``dask serve``; its help ends with ``examples``."""
    if examples:
        title = "Examples:" if len(examples) > 1 else "Example:"
        attributes["epilog"] = "\n".join(["\b", title, *(f"  dask serve {example}" for example in examples)])
    return click.command(cls=_Command, **attributes)
