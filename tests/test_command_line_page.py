"""docs/command-line.md says what ``--help`` says: each command, with its arguments and options."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from dask_serve.cli import COMMANDS, serve
from dask_serve.cli.connecting import cluster_options
from dask_serve.cli.messages import command

PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"


def found(name: str) -> click.Command:
    context = click.Context(serve, info_name="dask serve")
    one = serve.get_command(context, name)
    assert one is not None
    return one


@command()
@cluster_options
def bare() -> None:
    """The options that all commands have."""


def value_of(option: click.Option) -> str:
    if isinstance(option.type, click.Choice):
        return ", ".join(f"{choice}".lower() for choice in option.type.choices).replace(", ", "`, `")
    return option.metavar or {"integer range": "NUMBER", "directory": "PATH"}.get(option.type.name, "TEXT")


def table(options: list[click.Parameter]) -> str:
    """Return the options as the page has them."""
    rows = ["| option | meaning |", "|---|---|"]
    for option in options:
        assert isinstance(option, click.Option)
        names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
        takes = "" if option.is_flag else f" `{value_of(option)}`"
        default = f" Default: `{option.default}`." if option.show_default and not option.is_flag else ""
        assert option.help, option.name
        meaning = option.help if option.help.endswith(".") else f"{option.help}."
        rows.append(f"| {names}{takes} | {meaning.replace('|', chr(92) + '|')}{default} |")
    return "\n".join(rows)


def expected(name: str) -> str:
    """Return how the section of a command begins, and its options."""
    one = found(name)
    arguments = [p.metavar or str(p.name).upper() for p in one.params if isinstance(p, click.Argument)]
    usage = " ".join(["[OPTIONS]", *arguments])
    common = {option.name for option in bare.params}
    options = [p for p in one.params if isinstance(p, click.Option) and p.name not in common]
    parts = [f"## {name}\n", f"```\ndask serve {name} {usage}\n```\n"]
    return "\n".join([*parts, *([table(options) + "\n"] if options else [])])


def sections() -> dict[str, str]:
    text = PAGE.read_text(encoding="utf-8")
    return {part.partition("\n")[0]: f"## {part}" for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_described(name):
    section = sections().get(name, "")
    for part in expected(name).split("\n\n"):
        assert part.strip() in section, f"docs/command-line.md should have:\n\n{expected(name)}"


def test_the_options_of_all_commands_are_described():
    assert table(list(bare.params)) in sections()["Which cluster"], table(list(bare.params))


def test_no_other_command_is_described():
    assert [name for name in sections() if name in COMMANDS] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_list_and_has_examples(name):
    one = found(name)
    assert "..." not in one.get_short_help_str(limit=66), "the first sentence is too long for `dask serve --help`"
    if name != "shutdown":
        assert one.epilog is not None
        assert "Example" in one.epilog
