# SPDX-License-Identifier: Apache-2.0
"""What the tests share: a Ray cluster, a server of two engines, and whose turn it is."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import WARM, LiveServer, start_server, stop_server

if TYPE_CHECKING:
    from tests.deploy.ray_cluster import RayCluster


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-timeout's: waiting is no test's time
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test with the mark `alone` waits until no other worker's test runs, and others wait for it.

    What it looks at, how long a dead replica stays, would say more of a start beside it.
    """
    # pytest calls the hooks of a conftest.py for every test, whichever folder it is in
    if "PYTEST_XDIST_WORKER" not in os.environ or Path(__file__).parent not in item.path.parents:
        return (yield)
    # the folder that pytest's workers share
    turn = Path(item.config._tmp_path_factory.getbasetemp().parent, "turn")  # type: ignore[attr-defined]
    with turn.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        return (yield)


@pytest.fixture(scope="session")
def warm() -> Iterator[Path]:
    """From which Ray's workers, and servers, are forked."""
    pytest.importorskip("ray", reason="Ray is not installed here: make test-deploy")
    from tests.deploy.ray_cluster import warm_process

    with warm_process() as path:
        yield path


@pytest.fixture(scope="session", autouse=True)
def _servers_start_warm(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("ray") is not None:  # `make test` starts one server for all of its tests
            patch.setenv(WARM, str(request.getfixturevalue("warm")))
        yield


@pytest.fixture(scope="session")
def cluster(warm: Path) -> Iterator[RayCluster]:
    """Two nodes with a replica of the demo model on each, as deploy/ray/README.md sets them up."""
    from tests.deploy.ray_cluster import ray_cluster, serve_file

    with ray_cluster(warm) as cluster:
        took = cluster.serve(serve_file())
        print(f"\ntwo engines on two nodes: {took:.0f} s")
        yield cluster


@pytest.fixture(scope="session")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """`vtprune serve` with two engines and two API processes."""
    server = start_server(tmp_path_factory.mktemp("parallel") / "server.log", "--data-parallel-size", "2")
    yield server
    stop_server(server)
