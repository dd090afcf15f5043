"""What a command says when something is wrong: what and where in the first line, what to do in the second.

The exit code is 2 for a command that was not written as it should be, and 1 for one that failed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import IO, Any

import click

__all__ = ["Failure", "Misused", "Misuses", "coloured", "command", "told"]


_DEBUG = "dask_serve.debug"

#: Where messages of `dask_serve.exceptions` begin to say what to do.
_REPAIR = re.compile(r"; |: (?=(?:install|start|use|write|give|call|deploy|choose|make|add|wait|set|name|open)\b)")


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

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it on stderr."""
        click.echo(f"{_error()} {self.format_message()}", file=file, err=True)


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
        """Print it on stderr."""
        path = self.ctx.command_path if self.ctx is not None else "dask serve"
        repair = self.repair or f"`{path} --help` tells what it takes"
        click.echo(f"{_error()} {self.format_message()}\n{repair}", file=file, err=True)


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
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                callback=_note_debug,
                help="Show the traceback of an error.",
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            if isinstance(error, Misused):
                error.ctx = error.ctx or ctx
                raise
            raise Misused(error.format_message(), "", error.ctx or ctx) from None
        except (click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.meta.get(_DEBUG):
                _show_traceback()
            raise told(error) from error


def _note_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta[_DEBUG] = value


def _show_traceback() -> None:
    import traceback

    click.echo(traceback.format_exc().rstrip(), err=True)


def told(error: Exception) -> click.ClickException:
    """Return the exception that click prints as one message: what and where in a line, what to do in the next."""
    if isinstance(error, click.ClickException):
        return error
    from ..exceptions import ServeError

    if isinstance(error, ServeError):
        what, *rest = _REPAIR.split(str(error), 1)
        return Failure(str(error)) if "\n" in what else Failure(what, "".join(rest))
    return Failure(f"{type(error).__name__}: {error}", "--debug shows where it comes from")


def _error() -> str:
    return coloured("Error:", "red", bold=True)


def coloured(text: str, colour: str | None, **styles: Any) -> str:
    """Return text in a colour, for terminals of people who want colours."""
    # Click strips it where no terminal reads it, and does not know the variable.
    return text if colour is None or os.environ.get("NO_COLOR") else click.style(text, fg=colour, **styles)


def command(*examples: str, **attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command of ``dask serve``; its help ends with ``examples``."""
    if examples:
        title = "Examples:" if len(examples) > 1 else "Example:"
        attributes["epilog"] = "\n".join(["\b", title, *(f"  dask serve {example}" for example in examples)])
    return click.command(cls=_Command, **attributes)
