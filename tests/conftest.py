"""Fixtures of distributed's own test suite, for tests of ours that use ``gen_cluster``, ``cluster`` or a client."""

from __future__ import annotations

import pytest
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

from dask_serve.session.waiting import call_back


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory):
    """Schedulers that tests start save their state here, and not in the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def callback_thread():
    """Dask's thread for callbacks stays; it is there before a test counts threads."""
    call_back(lambda ref: None, None)
