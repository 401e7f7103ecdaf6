# SPDX-License-Identifier: Apache-2.0
"""Ray Serve under load: kills, a drain, a rolling update and autoscaling.

`make test-deploy ARGS="-s -k failures"` prints the table in deploy/ray/README.md.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.deploy.load import Load, Report
from tests.helpers.client import metric

if TYPE_CHECKING:
    from tests.deploy.ray_cluster import RayCluster

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1500)]

CLIENTS = 8
#: What may happen to a request that was in flight; everything else is a defect.
ALLOWED = (
    "503 JSON with Retry-After",
    "error event in a stream",
    "stream without its end",
    "connection broken",
)


@pytest.fixture
def loaded(cluster: RayCluster) -> Callable[..., Report]:
    """Runs an action under load, waits until all is as before, and loads on for a while."""
    from tests.deploy.ray_cluster import serve_file, wait_until

    cluster.deploy(serve_file())
    cluster.wait_running(2)

    def run(name: str, action: Callable[[], Any], noticed: Callable[[], bool] | None = None) -> Report:
        load = Load([cluster.url(0), cluster.url(1)], CLIENTS)
        with load.running() as report:
            wait_until(lambda: report.right > 100, 120)
            action()
            if noticed is not None:
                gone = wait_until(noticed, 60, cluster.describe, every=0.1)
            back = cluster.wait_running(2)
            enough = report.right + 100
            wait_until(lambda: report.right > enough, 120)
        spans = f" gone after {gone:.1f} s," if noticed is not None else ""
        print(f"\n{report.row(name)}{spans} back after {back:.0f} s")
        assert report.wrong == []
        return report

    return run


def only_in_flight_was_lost(report: Report, seconds: float = 5) -> None:
    """Failures of the kinds allowed, near the kill, and few: some each client."""
    assert all(kind.startswith(ALLOWED) for kind in report.kinds), report.kinds
    assert report.spell <= seconds, report.failed
    assert len(report.failed) <= 3 * CLIENTS, report.kinds


def replica_on(cluster: RayCluster, node: int) -> dict[str, Any]:
    (replica,) = [r for r in cluster.replicas() if r["node_ip"] == cluster.nodes[node].address]
    return replica


def test_a_killed_replica_loses_what_it_had_in_flight(cluster: RayCluster, loaded: Any) -> None:
    old = replica_on(cluster, 1)
    report = loaded(
        "replica",
        lambda: os.kill(old["pid"], signal.SIGKILL),
        lambda: old["replica_id"] not in [r["replica_id"] for r in cluster.replicas()],
    )
    only_in_flight_was_lost(report)


def test_a_replica_whose_engine_died_leaves_within_two_seconds(cluster: RayCluster, loaded: Any) -> None:
    from tests.deploy.ray_cluster import wait_until

    old = replica_on(cluster, 1)
    engine = cluster.engine_of(old)
    left: list[float] = []

    def kill() -> None:
        engine.kill()
        left.append(wait_until(lambda: not os.path.exists(f"/proc/{old['pid']}"), 30, every=0.05))

    report = loaded(
        "engine", kill, lambda: old["replica_id"] not in [r["replica_id"] for r in cluster.replicas()]
    )
    assert left[0] <= 2
    only_in_flight_was_lost(report, 3)


def test_a_lost_node_comes_back_into_service(cluster: RayCluster, loaded: Any) -> None:
    def lose() -> None:
        cluster.nodes[1].kill()
        cluster.start_node(1)

    report = loaded("node", lose, lambda: len(cluster.replicas()) < 2)
    only_in_flight_was_lost(report, 15)


def test_a_killed_proxy_comes_back(cluster: RayCluster, loaded: Any) -> None:
    from tests.deploy.ray_cluster import wait_until

    proxy = cluster.proxy_of(1)

    def kill() -> None:
        proxy.kill()
        back = wait_until(lambda: cluster.proxy_of(1).pid != proxy.pid, 120, every=0.2)
        print(f"\nthe proxy's port is back after {back:.0f} s")

    report = loaded("proxy", kill)
    assert all(kind.startswith("connection broken") or kind in ALLOWED for kind in report.kinds), report.kinds
    assert len(report.failed) <= CLIENTS


def test_fewer_replicas_and_a_new_version_lose_nothing(cluster: RayCluster, loaded: Any) -> None:
    from tests.deploy.ray_cluster import serve_file

    def drain() -> None:
        cluster.deploy(serve_file(num_replicas=1))
        cluster.wait_running(1)
        cluster.deploy(serve_file(num_replicas=2))

    before = {replica["replica_id"] for replica in cluster.replicas()}
    assert loaded("drained replica", drain).failed == []
    old = {replica["replica_id"] for replica in cluster.replicas()}
    assert len(old - before) == 1

    def update() -> None:
        cluster.deploy(serve_file("--max-num-seqs 12"))

    def all_new() -> bool:
        return not old & {replica["replica_id"] for replica in cluster.replicas()}

    assert loaded("rolling update", update, lambda: any_left(cluster, old)).failed == []
    assert all_new()


def any_left(cluster: RayCluster, old: set[str]) -> bool:
    return bool(old - {replica["replica_id"] for replica in cluster.replicas()})


def test_load_brings_a_second_replica_and_its_end_takes_it_away(cluster: RayCluster) -> None:
    from tests.deploy.ray_cluster import serve_file

    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 4,
    }
    config = serve_file(autoscaling_config=scaling)
    del config["applications"][0]["deployments"][0]["num_replicas"]
    cluster.deploy(config)
    cluster.wait_running(1)
    with Load([cluster.url(0)], CLIENTS).running() as report:
        up = cluster.wait_running(2)
    down = cluster.wait_running(1)
    print(f"\nscaled up after {up:.0f} s of load, down {down:.0f} s after its end")
    assert report.failed == [] and report.wrong == []
    assert metric(cluster.url(0), "vtprune_replica_up") == 1
