"""Which devices (GPUs) a worker's process sees.

All replicas of a process see the same ones: ``CUDA_VISIBLE_DEVICES`` is read once, when CUDA begins, so that a replica
cannot be shown its own only. It is told which are its own, and has to use those.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import dask

from ..exceptions import ConfigError

__all__ = ["detect_devices"]

#: Seconds that the driver's tool may take.
TIMEOUT = 20.0


def detect_devices() -> list[tuple[str, int]]:
    """Return the devices of this process: a name that is the same in all processes of the host, and the ordinal here.

    ``serve.gpus`` in Dask's configuration (``DASK_SERVE__GPUS``) comes first, in the form of ``CUDA_VISIBLE_DEVICES``:
    devices that this worker may give to replicas, in the order of preference. Otherwise all that
    ``CUDA_VISIBLE_DEVICES`` names (dask-cuda sets it for each worker, with the worker's own first), otherwise all that
    the driver knows. May block.

    Raises
    ------
    ConfigError
        ``serve.gpus`` is not valid.
    """
    visible = _names(os.environ.get("CUDA_VISIBLE_DEVICES"))
    chosen = _configured(dask.config.get("serve.gpus", None))
    if chosen is None:
        seen = _driver_devices() if visible is None else visible
        return [(name, ordinal) for ordinal, name in enumerate(seen)]
    if visible is not None:
        return [(name, visible.index(name)) for name in chosen if name in visible]
    return [(name, int(name) if name.isdigit() else ordinal) for ordinal, name in enumerate(chosen)]


def _names(text: str | None) -> list[str] | None:
    """Take ``CUDA_VISIBLE_DEVICES`` apart; as for CUDA itself, an entry that is none ends the list."""
    if text is None:
        return None
    names: list[str] = []
    for name in text.split(","):
        stripped = name.strip()
        if not stripped or stripped.startswith("-") or stripped.lower() in ("none", "nodevfiles", "void"):
            break
        names.append(stripped)
    return names


def _configured(value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    if not isinstance(value, str):
        raise ConfigError(
            f"serve.gpus = {value!r} in Dask's configuration is not valid: name devices as CUDA_VISIBLE_DEVICES does, "
            "e.g. '0,1'; '' for none"
        )
    names = _names(value)
    assert names is not None
    if len(set(names)) < len(names):
        raise ConfigError(f"serve.gpus = {value!r} in Dask's configuration names a device twice")
    return names


def _driver_devices() -> Sequence[str]:
    """Number the devices that the driver knows."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return [str(number) for number in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # noqa: BLE001 - not installed, or no driver: its errors are classes of its own
        pass
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=index", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in run.stdout.splitlines() if line.strip().isdigit()]
