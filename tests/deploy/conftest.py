# SPDX-License-Identifier: Apache-2.0
"""The Ray cluster that the tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.deploy.ray_cluster import RayCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """Two nodes with a replica of the demo model on each, as deploy/ray/README.md sets them up."""
    pytest.importorskip("ray", reason="Ray is not installed here: make test-deploy")
    from tests.deploy.ray_cluster import ray_cluster, serve_file

    with ray_cluster() as cluster:
        cluster.deploy(serve_file())
        cluster.wait_running(2)
        yield cluster
