"""``dask serve``: the group, and where its commands are.

Every ``dask`` command loads this module: it imports click, and a command's module only when that is asked for.
"""

from __future__ import annotations

import importlib

import click

from .messages import Misused, Misuses

__all__ = ["serve"]

#: The module of each command, in which a function has the command's name. They are listed in this order.
COMMANDS = {
    "run": "run",
    "deploy": "documents",
    "build": "documents",
    "migrate": "migrate",
    "status": "look",
    "logs": "logs",
    "config": "look",
    "scale": "change",
    "rollback": "change",
    "drain": "change",
    "delete": "change",
    "shutdown": "change",
    "doctor": "doctor",
    "proxy": "proxy",
}


class _Group(Misuses, click.Group):
    """Loads a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f".{COMMANDS[name]}", __name__)
        command: click.Command = getattr(module, name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise Misused(f"there is no command {args[0]!r}", f"{meant}The commands: {', '.join(COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Group)
def serve() -> None:
    """Serve Python models on a Dask cluster."""
