"""What is wrong with a document: all of it, each with its line."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from ..exceptions import ConfigError

__all__ = ["DocumentError", "Problem", "Problems"]

#: ``("applications", 0, "name")``
Path = tuple[str | int, ...]


class Problem(Struct, frozen=True, order=True):
    """One mistake.

    Attributes
    ----------
    line, column : int
        Where it is, from 1 on.
    field : str
        Of which it is said, e.g. ``applications[0].route_prefix``; empty for the document as a whole.
    message : str
        What is wrong, and what to write.
    """

    line: int
    column: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {f'{self.field}: ' if self.field else ''}{self.message}"


class DocumentError(ConfigError):
    """A document has mistakes; the message lists all of them.

    Parameters
    ----------
    name : str
        Name of the document.
    problems : iterable of Problem
        The mistakes.
    """

    def __init__(self, name: str, problems: Iterable[Problem]) -> None:
        self.name = name
        #: The mistakes, in the order of their lines.
        self.problems = sorted(set(problems))
        number = len(self.problems)
        count = "a mistake" if number == 1 else f"{number} mistakes"
        super().__init__("\n".join([f"{name} has {count}, and nothing was changed", *map(str, self.problems)]))

    def __reduce__(self) -> tuple[type, tuple[str, list[Problem]]]:
        return type(self), (self.name, self.problems)


class Problems:
    """Gathers the mistakes of one document.

    Parameters
    ----------
    name : str
        Of the document.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: list[Problem] = []

    def add(self, position: tuple[int, int], path: Path, message: str) -> None:
        """Note a mistake; ``position`` is line and column, from 0 on."""
        self.found.append(Problem(position[0] + 1, position[1] + 1, field_of(path), message))

    def has(self, path: Path) -> bool:
        """Whether a mistake of that field is known."""
        return any(problem.field == field_of(path) for problem in self.found)

    def check(self) -> None:
        """Raise `DocumentError` if there are any."""
        if self.found:
            raise DocumentError(self.name, self.found)


def field_of(path: Path) -> str:
    """Write a path as people do."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
