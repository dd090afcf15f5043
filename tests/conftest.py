"""Fixtures of distributed's own test suite, for tests of ours that use ``gen_cluster``, ``cluster`` or a client."""

from __future__ import annotations

from distributed.utils_test import (  # noqa: F401
    a,
    b,
    cleanup,
    client,
    cluster_fixture,
    loop,
    loop_in_thread,
    s,
    security,
    tls_client,
    tls_cluster,
)
