"""What the process of a replica is to have, as it travels from a session to the workers."""

from __future__ import annotations

import hashlib

import msgspec
from msgspec import Struct

__all__ = ["Archive", "Environment"]


class Archive(Struct, frozen=True, array_like=True):
    """A directory or a module that is sent: its name, and the key under which the controller has it."""

    name: str
    key: str
    #: Where it lies in the session: ``__file__`` of its modules begins with it.
    origin: str = ""


class Environment(Struct, frozen=True, kw_only=True):
    """A ``runtime_env`` with everything in it: files read, directories packed."""

    #: Requirements and options of pip, line by line.
    pip: list[str] = []
    env_vars: dict[str, str] = {}
    working_dir: Archive | None = None
    py_modules: list[Archive] = []

    @property
    def id(self) -> str:
        """Name it: equal environments have equal names, wherever their directories lie."""
        content = [
            self.pip,
            self.env_vars,
            None if self.working_dir is None else self.working_dir.key,
            [[archive.name, archive.key] for archive in self.py_modules],
        ]
        return hashlib.blake2b(msgspec.json.encode(content, order="deterministic"), digest_size=6).hexdigest()

    @property
    def archives(self) -> list[Archive]:
        """What is sent."""
        return [*self.py_modules, *([] if self.working_dir is None else [self.working_dir])]

    def __bool__(self) -> bool:
        return bool(self.pip or self.env_vars or self.archives)

    def describe(self) -> str:
        """Say in a few words what it is; values of variables, which may be secrets, are left out."""
        parts = []
        if self.pip:
            more = f" and {len(self.pip) - 3} more" if len(self.pip) > 3 else ""
            parts.append(f"pip: {', '.join(self.pip[:3])}{more}")
        if self.env_vars:
            parts.append(f"env_vars: {', '.join(sorted(self.env_vars)[:5])}")
        if self.working_dir is not None:
            parts.append(f"working_dir: {self.working_dir.name}")
        if self.py_modules:
            parts.append(f"py_modules: {', '.join(archive.name for archive in self.py_modules[:3])}")
        return "; ".join(parts)
