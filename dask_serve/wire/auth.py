"""Who may talk: both sides prove that they know the cluster's secret, and neither sends it.

Each side signs both nonces under a label of its own, so that a proof can be neither replayed nor reflected. The
listener's proof covers its incarnation too: a port that another process took over is noticed.
"""

from __future__ import annotations

import hmac
import secrets

__all__ = ["NONCE_SIZE", "caller_proof", "door_proof", "new_nonce", "same"]

NONCE_SIZE = 16

same = hmac.compare_digest


def new_nonce() -> bytes:
    """Return fresh random bytes."""
    return secrets.token_bytes(NONCE_SIZE)


def door_proof(secret: bytes, caller: bytes, door: bytes, process: str) -> bytes:
    """Sign both nonces and the incarnation, as the listener."""
    return hmac.digest(secret, b"dask-serve door\0" + caller + door + process.encode(), "sha256")


def caller_proof(secret: bytes, caller: bytes, door: bytes) -> bytes:
    """Sign both nonces, as the dialler."""
    return hmac.digest(secret, b"dask-serve caller\0" + caller + door, "sha256")
