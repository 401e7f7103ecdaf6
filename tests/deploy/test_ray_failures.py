# SPDX-License-Identifier: Apache-2.0
"""Ray Serve under load: kills, a rolling update, and autoscaling down and up.

`make test-deploy ARGS="-k failures"` prints the table in deploy/ray/README.md at its end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import tell_at_the_end
from tests.deploy.load import Load, Report
from tests.helpers.client import metric

if TYPE_CHECKING:
    from tests.deploy.ray_cluster import RayCluster

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.timeout(1500)]

CLIENTS = 8
#: The pause of each client while an engine starts, in seconds: two cores have to do for both.
CALM = 2.0
#: What may happen to a request that was in flight; everything else is a defect.
ALLOWED = (
    "503 JSON with Retry-After",
    "error event in a stream",
    "stream without its end",
    "connection broken",
)


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Has a line printed below the report."""
    return lambda line: tell_at_the_end(request.config, [line])


@pytest.fixture
def loaded(cluster: RayCluster, tell: Callable[[str], None]) -> Callable[..., Report]:
    """Runs an action under load, waits until two replicas run again, and loads on for a while."""
    from tests.deploy.ray_cluster import serve_file, wait_until

    cluster.serve(serve_file(cluster.flags))

    def run(name: str, action: Callable[[], Any], noticed: Callable[[], bool] | None = None) -> Report:
        load = Load([cluster.url(0), cluster.url(1)], CLIENTS)
        with load.running() as report:
            wait_until(lambda: report.right > 100, 120)
            action()
            spans = ""
            if noticed is not None:
                gone = wait_until(noticed, 60, cluster.describe, every=0.1)
                spans = f" gone after {gone:.1f} s,"
            load.pause = CALM
            back = cluster.wait_running(2)
            load.pause = 0
            enough = report.right + 100
            wait_until(lambda: report.right > enough, 120)
        tell(f"{report.row(name)}{spans} back after {back:.0f} s")
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


def test_a_killed_proxy_comes_back(cluster: RayCluster, loaded: Any, tell: Callable[[str], None]) -> None:
    from tests.deploy.ray_cluster import wait_until

    proxy = cluster.proxy_of(1)

    def kill() -> None:
        proxy.kill()
        back = wait_until(lambda: cluster.proxy_of(1).pid != proxy.pid, 120, every=0.2)
        tell(f"the proxy's port is back after {back:.0f} s")

    report = loaded("proxy", kill)
    assert all(kind.startswith("connection broken") or kind in ALLOWED for kind in report.kinds), report.kinds
    assert len(report.failed) <= CLIENTS


def scaling_file(fewest: int) -> dict[str, Any]:
    """A new version, scaled by its load. Serve takes scaling instead of a number for a new version too."""
    from tests.deploy.ray_cluster import serve_file

    config = serve_file("--max-num-seqs 12")
    (deployment,) = config["applications"][0]["deployments"]
    del deployment["num_replicas"]
    deployment["autoscaling_config"] = {
        "min_replicas": fewest,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "metrics_interval_s": 0.5,
        "look_back_period_s": 2,
        "upscale_delay_s": 1,
        "downscale_delay_s": 4,
    }
    return config


def test_a_new_version_replaces_the_old_one_and_nothing_is_lost(cluster: RayCluster, loaded: Any) -> None:
    old = {replica["replica_id"] for replica in cluster.replicas()}
    report = loaded(
        "rolling update",
        lambda: cluster.deploy(scaling_file(2)),
        lambda: bool(old - {replica["replica_id"] for replica in cluster.replicas()}),
    )
    assert report.failed == []
    assert not old & {replica["replica_id"] for replica in cluster.replicas()}


def test_replicas_come_and_go_with_the_load_and_nothing_is_lost(
    cluster: RayCluster, tell: Callable[[str], None]
) -> None:
    from tests.deploy.ray_cluster import wait_until

    cluster.serve(scaling_file(2))
    # a node that loses its replica loses its proxy too: these clients stay with the head's
    load = Load([cluster.url(0)], CLIENTS)
    with load.running() as report:
        wait_until(lambda: report.right > 100, 120)
        load.pause = CALM
        down = cluster.serve(scaling_file(1), 1)
        load.pause = 0
        up = cluster.wait_running(2)
        load.pause = CALM
        down_again = cluster.wait_running(1)
    tell(f"{report.row('scaling')} down after {down:.0f} s, up {up:.0f} s, down {down_again:.0f} s")
    assert report.failed == [] and report.wrong == []
    assert metric(cluster.url(0), "vtprune_replica_up") == 1
