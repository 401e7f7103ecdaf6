# SPDX-License-Identifier: Apache-2.0
"""Ray Serve over two nodes: the contract, affinity, and what an operator sees."""

from __future__ import annotations

import json
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import yaml
from PIL import Image

from tests.deploy.contract import run_contract_tests
from tests.deploy.prometheus import MISSING, prometheus
from tests.helpers.client import CHAT, chat_body, metric, post
from tests.helpers.pictures import noise, scene
from vtprune_server.ray_proxy import picture_key

if TYPE_CHECKING:
    from tests.deploy.ray_cluster import RayCluster

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]


def test_the_contract_holds_through_serve(cluster: RayCluster) -> None:
    run_contract_tests(cluster.url(0))


def test_serve_status_says_that_it_runs(cluster: RayCluster) -> None:
    application = yaml.safe_load(cluster.serve_command("status"))["applications"]["vtprune"]
    assert application["status"] == "RUNNING"
    assert application["deployments"]["VTPrune"]["replica_states"] == {"RUNNING": 2}


def test_every_answer_has_its_request_id_once(cluster: RayCluster) -> None:
    url = cluster.url(1)
    own = {"X-Request-Id": "once-1"}
    answers = [
        post(url, chat_body(scene()), own),
        post(url, chat_body(scene(), vtprune={"strength": 1}), own),
        post(url, {**chat_body(), "model": "nope"}, own),
        httpx.get(f"{url}/v1/models", headers=own),
    ]
    with httpx.stream("POST", url + CHAT, json=chat_body(scene(), stream=True), headers=own) as stream:
        answers.append(stream)
    assert [a.status_code for a in answers] == [200, 400, 404, 200, 200]
    assert [a.headers.get_list("X-Request-Id") for a in answers] == [["once-1"]] * 5
    (given,) = post(url, chat_body(scene())).headers.get_list("X-Request-Id")
    (instead,) = post(url, chat_body(scene()), {"X-Request-Id": "x" * 200}).headers.get_list("X-Request-Id")
    log = cluster.logs()
    # vLLM puts a prefix before it
    assert all(f'{name}"' in log for name in ("once-1", given, instead))


def test_a_picture_goes_to_one_replica_through_every_proxy(cluster: RayCluster) -> None:
    pictures = [noise(seed) for seed in range(1000, 1016)]
    assert tower_passes(cluster, pictures, keyed=True) == len(pictures)


def test_without_its_key_a_picture_goes_to_any_replica(cluster: RayCluster) -> None:
    pictures = [noise(seed) for seed in range(2000, 2016)]
    assert tower_passes(cluster, pictures, keyed=False) > len(pictures)


def tower_passes(cluster: RayCluster, pictures: list[Image.Image], keyed: bool) -> float:
    """Ask four times about each picture, by both proxies; how often a replica needed the tower."""
    before = metric(cluster.url(0), "vtprune_tower_cache_misses_total")
    hits = metric(cluster.url(0), "vtprune_tower_cache_hits_total")
    for i, picture in enumerate(pictures):
        for turn, preset in enumerate(("off", "light", "balanced", "aggressive")):
            headers = {"X-VTPrune-Preset": preset}
            if not keyed:  # a session id that says nothing of the picture
                headers["X-Session-Id"] = f"{i}-{turn}"
            assert post(cluster.url(turn % 2), chat_body(picture), headers).status_code == 200
    misses = metric(cluster.url(0), "vtprune_tower_cache_misses_total") - before
    hits = metric(cluster.url(0), "vtprune_tower_cache_hits_total") - hits
    assert misses + hits == 4 * len(pictures)
    return misses


def test_a_clients_own_digest_is_what_counts(cluster: RayCluster) -> None:
    """The header as documented for clients: the same key as the proxy's is the same replica."""
    picture = noise(3000)
    key = picture_key(json.dumps(chat_body(picture)).encode())
    before = metric(cluster.url(0), "vtprune_tower_cache_misses_total")
    for node, headers in ((0, {}), (1, {"X-Session-Id": str(key)}), (0, {"x-session-id": str(key)})):
        preset = {"X-VTPrune-Keep-Ratio": f"0.{node + len(headers) + 2}"}
        assert post(cluster.url(node), chat_body(picture), {**headers, **preset}).status_code == 200
    assert metric(cluster.url(0), "vtprune_tower_cache_misses_total") == before + 1


def test_metrics_are_those_of_all_replicas_and_each_can_be_scraped(cluster: RayCluster) -> None:
    for node in (0, 1):
        targets = httpx.get(f"{cluster.url(node)}/vtprune/metrics-targets", timeout=30).json()
        assert len(targets) == 2
        text = httpx.get(f"{cluster.url(node)}/metrics", timeout=30).text
        for target in targets:
            (address,), replica = target["targets"], target["labels"]["replica"]
            assert f'vtprune_replica_up{{replica="{replica}"}} 1' in text
            own = httpx.get(f"http://{address}/metrics", timeout=30).text
            assert "vtprune_requests_total" in own and "vllm:num_requests_running" in own


def test_flags_that_cannot_work_are_said_before_a_replica_starts(cluster: RayCluster) -> None:
    from ray.serve.exceptions import RayServeException

    from vtprune_server.ray_app import app

    for args, said in (
        ({"flags": "--port 9000"}, "http_options"),
        ({"flags": ["--data-parallel-size", "2"]}, "num_replicas"),
        ({"flags": "--api-key secret"}, "VLLM_API_KEY"),
        ({"flags": "--prune-layer banana"}, "banana"),
        ({"flags": "--no-such-flag"}, "--no-such-flag"),
        ({"replicas": 3}, "'replicas'"),
    ):
        with pytest.raises(RayServeException, match=said):
            app(args)


def test_a_stranger_to_the_cluster_gets_nothing(cluster: RayCluster) -> None:
    head = cluster.nodes[0]
    with socket.socket() as dashboard:
        dashboard.settimeout(5)
        loopback_only = dashboard.connect_ex((head.address, 8265)) != 0
    assert loopback_only or head.namespace is None
    env = {**cluster.env, "RAY_AUTH_MODE": "disabled"}
    command = cluster.nodes[1].command(cluster.env["RAY"], "status", "--address", f"{head.address}:6379")
    assert subprocess.run(command, env=env, capture_output=True, timeout=120).returncode != 0


def test_one_picture_that_everybody_asks_about_spills_over(cluster: RayCluster) -> None:
    from tests.deploy.ray_cluster import serve_file

    cluster.serve(serve_file(max_ongoing_requests=1))
    body = chat_body(noise(4000), max_tokens=32, ignore_eos=True)
    before = served_by_replica(cluster)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(cluster.url(0), body).status_code, range(24)))
    after = served_by_replica(cluster)
    assert answers == [200] * 24
    assert all(after[replica] > before.get(replica, 0) for replica in after) and len(after) == 2


def served_by_replica(cluster: RayCluster) -> dict[str, float]:
    targets = httpx.get(f"{cluster.url(0)}/vtprune/metrics-targets", timeout=30).json()
    return {
        target["labels"]["replica"]: metric(f"http://{target['targets'][0]}", "vtprune_requests_total")
        for target in targets
    }


def test_more_than_fits_is_a_503_that_says_when_to_come_back(cluster: RayCluster) -> None:
    from tests.deploy.ray_cluster import serve_file

    cluster.serve(serve_file(max_ongoing_requests=1, max_queued_requests=1))
    body = chat_body(noise(5000), max_tokens=64, ignore_eos=True)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: post(cluster.url(0), body), range(32)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 0 < len(refused) < 32
    for answer in refused:
        assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
        assert answer.json()["error"]["code"] == 503
        assert len(answer.headers.get_list("X-Request-Id")) == 1


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize("job", ["vtprune", "vtprune-replicas"])
def test_prometheus_counts_every_request_and_sees_no_reset(
    cluster: RayCluster, job: str, tmp_path: Path
) -> None:
    from tests.deploy.ray_cluster import FILES, serve_file, wait_until

    cluster.serve(serve_file())
    text = (FILES / "prometheus.yaml").read_text()
    config = yaml.safe_load(text.replace("serve.example:8000", httpx.URL(cluster.url(1)).netloc.decode()))
    config["scrape_configs"] = [one for one in config["scrape_configs"] if one["job_name"] == job]
    config["global"] = {"scrape_interval": "1s"}
    before = sum(served_by_replica(cluster).values())
    with prometheus(config, tmp_path) as server:
        seen = "sum(vtprune_requests_total)"
        wait_until(lambda: server.query(seen) == before, 60)
        for i in range(40):
            assert post(cluster.url(i % 2), chat_body(noise(6000 + i))).status_code == 200
        wait_until(lambda: server.query(seen) == before + 40, 30)
        assert server.query("count(count by (replica) (vtprune_requests_total))") == 2
        assert server.query("sum(resets(vtprune_requests_total[5m]))") == 0
        assert server.query("sum(resets(vtprune_tower_cache_misses_total[5m]))") == 0
