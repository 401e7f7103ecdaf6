# SPDX-License-Identifier: Apache-2.0
"""What the tests share: a Ray cluster, a server of two engines, and whose turn it is."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import LiveServer, start_server, stop_server

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
    """From which Ray's workers are forked."""
    pytest.importorskip("ray", reason="Ray is not installed here: make test-deploy")
    from tests.deploy.ray_cluster import warm_process

    with warm_process() as path:
        yield path


@pytest.fixture(scope="session")
def cluster(warm: Path) -> Iterator[RayCluster]:
    """Two nodes with a replica of the demo model on each, as deploy/ray/README.md sets them up."""
    from tests.deploy.ray_cluster import ray_cluster, serve_file

    with ray_cluster(warm) as cluster:
        took = cluster.serve(serve_file())
        print(f"\ntwo engines on two nodes: {took:.0f} s")
        yield cluster


@pytest.fixture(scope="session")
def parallel(tmp_path_factory: pytest.TempPathFactory, warm: Path) -> Iterator[LiveServer]:
    """`vtprune serve` with two engines and two API processes."""
    log = tmp_path_factory.mktemp("parallel") / "server.log"
    server = start_server(log, "--data-parallel-size", "2", env={"VTPRUNE_TEST_WARM": str(warm)})
    yield server
    stop_server(server)
