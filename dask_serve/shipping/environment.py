"""From the ``runtime_env`` that a user wrote to what travels: requirement files are read, directories are packed."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from dask.utils import format_bytes

from ..config import RuntimeEnv
from ..exceptions import ConfigError
from ..policy.environment import Archive, Environment

__all__ = ["DIRECTORY_LIMIT", "resolve"]

#: Bytes that the files of one directory may have together: they pass through the scheduler.
DIRECTORY_LIMIT = 100 * 2**20

#: Never sent, at any depth.
_LEFT_OUT = (".git", ".hg", ".svn", "__pycache__", "*.py[co]", ".venv", "venv", "node_modules", ".*_cache", ".DS_Store")
#: Makes equal contents equal archives.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def resolve(env: RuntimeEnv | None, where: str) -> tuple[Environment | None, dict[str, bytes]]:
    """Read and pack what a ``runtime_env`` names.

    Parameters
    ----------
    env : RuntimeEnv or None
    where : str
        Whose it is, for messages.

    Returns
    -------
    environment : Environment or None
        None: nothing is asked for.
    archives : dict of str to bytes
        The directories, by the keys that are in the environment.

    Raises
    ------
    ConfigError
        A file or directory is not there, not readable or too large, or a requirement makes no sense on a worker.
    """
    if env is None:
        return None, {}
    packed: dict[str, bytes] = {}

    def pack(path: str, option: str) -> Archive:
        blob = _pack(path, option, env.excludes, f"{where}: {option} of runtime_env")
        key = "files-" + hashlib.blake2b(blob, digest_size=12).hexdigest()
        packed[key] = blob
        root = Path(path).absolute()
        return Archive(root.name, key, str(root))

    environment = Environment(
        pip=_requirements(env.pip, where),
        env_vars=env.env_vars,
        working_dir=None if env.working_dir is None else pack(env.working_dir, "working_dir"),
        py_modules=[pack(path, "py_modules") for path in env.py_modules],
    )
    return (environment, packed) if environment else (None, {})


# -- requirements ------------------------------------------------------------------------------------------------------


def _requirements(pip: list[str] | str, where: str) -> list[str]:
    if isinstance(pip, str):
        return list(_lines_of(Path(pip), where, ()))
    for line in pip:
        _check(line, f"{where}: pip of runtime_env")
    return [line.strip() for line in pip if line.strip()]


def _lines_of(path: Path, where: str, within: tuple[Path, ...]) -> Iterator[str]:
    """Read a requirements file, with those that it includes."""
    if path in within:
        raise ConfigError(f"{where}: the requirements file {path} includes itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{where}: pip={str(path)!r} of runtime_env is no requirements file that can be read ({error}); "
            "requirements themselves are given as a list: pip=['polars==1.9']"
        ) from None
    for raw in text.replace("\\\n", " ").splitlines():
        line = raw.split(" #")[0].strip()
        name, _, rest = line.partition(" ")
        if not line or line.startswith("#"):
            continue
        if name in {"-r", "--requirement"}:
            yield from _lines_of(path.parent / rest.strip(), where, (*within, path))
        else:
            _check(line, f"{where}: {path}")
            yield line


def _check(line: str, where: str) -> None:
    name = line.split(" ", maxsplit=1)[0].split("=", maxsplit=1)[0]
    if name in {"-e", "--editable"} or line.startswith(("./", "../")) or line.strip() == ".":
        raise ConfigError(
            f"{where} has {line!r}, which is a directory of this machine: workers do not have it; send it with "
            "py_modules or working_dir"
        )
    if name in {"-r", "--requirement"} or "\n" in line:
        raise ConfigError(f"{where} has {line!r}: give pip='requirements.txt' for a file, or one requirement per item")


# -- directories -------------------------------------------------------------------------------------------------------


def _pack(path: str, option: str, excludes: list[str], where: str) -> bytes:
    root = Path(path)
    if "://" in path:
        raise ConfigError(f"{where} = {path!r} is not valid: it is a directory of this machine, not a URL")
    if not root.is_dir() and not (option == "py_modules" and root.suffix == ".py" and root.is_file()):
        what = "it is no directory" if root.exists() else f"it is not there (seen from {Path.cwd()})"
        raise ConfigError(f"{where} = {path!r} is not valid: {what}")
    try:
        # Importable by its name.
        return _zip(
            root, f"{root.absolute().name}/" if option == "py_modules" and root.is_dir() else "", excludes, where
        )
    except OSError as error:
        raise ConfigError(f"{where} = {path!r} cannot be read: {error}") from None


def _zip(root: Path, prefix: str, excludes: list[str], where: str) -> bytes:
    files = dict(_files(root, excludes))
    sizes = {name: file.stat().st_size for name, file in files.items()}
    if sum(sizes.values()) > DIRECTORY_LIMIT:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        told = ", ".join(f"{name} ({format_bytes(sizes[name])})" for name in largest)
        raise ConfigError(
            f"{where} = {str(root)!r} has {format_bytes(sum(sizes.values()))}, more than "
            f"{format_bytes(DIRECTORY_LIMIT)}; the largest files are {told}: leave them out with excludes, and read "
            "them from where workers can"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, file in files.items():
            entry = zipfile.ZipInfo(prefix + name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o755 if os.access(file, os.X_OK) else 0o644) << 16
            archive.writestr(entry, file.read_bytes())
    return buffer.getvalue()


def _files(root: Path, excludes: list[str]) -> Iterator[tuple[str, Path]]:
    if root.is_file():
        yield root.name, root
        return
    for directory, names, files in os.walk(root, followlinks=False):
        here = Path(directory)
        within = PurePosixPath(here.relative_to(root).as_posix())
        names[:] = sorted(name for name in names if not _is_out(within / name, excludes))
        for name in sorted(files):
            # Sockets, pipes, and links to nothing are nothing to send.
            if not _is_out(within / name, excludes) and (here / name).is_file():
                yield str(within / name), here / name


def _is_out(path: PurePosixPath, excludes: list[str]) -> bool:
    if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _LEFT_OUT):
        return True
    return any(
        fnmatch.fnmatchcase(str(path), pattern.strip("/")) or fnmatch.fnmatchcase(path.name, pattern.strip("/"))
        for pattern in excludes
    )
