"""Which devices (GPUs) of a worker a replica gets."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

__all__ = ["Device", "describe_devices", "pick_devices", "share_of"]

#: Because 0.1 is booked and given back many times.
TOLERANCE = 1e-9


class Device(Struct, frozen=True):
    """One device, as a worker's process sees it."""

    #: Names the device on its host: worker processes that share it name it alike.
    id: str
    #: What it is called inside the process: ``cuda:<ordinal>``.
    ordinal: int
    #: Share of it that replicas have left, of 1.
    free: float = 1.0


def share_of(gpus: float) -> float:
    """Return the share of each of its devices that a replica takes."""
    return min(gpus, 1.0)


def pick_devices(gpus: float, devices: Sequence[Device]) -> list[Device] | None:
    """Return the devices for a replica, or None where they do not suffice.

    Whole devices are those that come first, a worker's own before those it merely sees. Fractions share: they go to the
    device with the least left that is enough.
    """
    share = share_of(gpus)
    left = [device for device in devices if device.free >= share - TOLERANCE]
    number = 1 if gpus < 1 else int(gpus)
    if len(left) < number:
        return None
    if gpus < 1:
        return [min(left, key=lambda device: device.free)]
    return left[:number]


def describe_devices(devices: Sequence[Device] | None) -> str:
    """Say what a worker has, for the reason why it does not suffice."""
    if devices is None:
        return "its devices are being looked up"
    if not devices:
        return "no GPUs found there"
    return f"free of its {len(devices)} GPUs: " + ", ".join(f"{device.id}: {device.free:g}" for device in devices)
