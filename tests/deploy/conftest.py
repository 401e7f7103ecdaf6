# SPDX-License-Identifier: Apache-2.0
"""What the tests share: a Ray cluster, and a server of two engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.conftest import LiveServer, start_server, stop_server

if TYPE_CHECKING:
    from tests.deploy.ray_cluster import RayCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """Two nodes with a replica of the demo model on each, as deploy/ray/README.md sets them up."""
    pytest.importorskip("ray", reason="Ray is not installed here: make test-deploy")
    from tests.deploy.ray_cluster import ray_cluster, serve_file

    with ray_cluster() as cluster:
        took = cluster.serve(serve_file())
        print(f"\ntwo engines on two nodes: {took:.0f} s")
        yield cluster


@pytest.fixture(scope="session")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """`vtprune serve` with two engines and two API processes."""
    server = start_server(tmp_path_factory.mktemp("parallel") / "server.log", "--data-parallel-size", "2")
    yield server
    stop_server(server)
