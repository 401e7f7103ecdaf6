# SPDX-License-Identifier: Apache-2.0
"""Two API processes and one vision tower: `vtprune serve --api-server-count 2 --vtprune-tower shared`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from prometheus_client.mmap_dict import MmapedDict

from tests.conftest import LiveServer, start_server, stop_server
from tests.helpers.client import N, answer, chat_body, counts, metric, post, told
from tests.helpers.pictures import scene

pytestmark = pytest.mark.engine

BALANCED = {"X-VTPrune-Preset": "balanced"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    log = tmp_path_factory.mktemp("shared") / "server.log"
    server = start_server(log, "--api-server-count", "2", "--vtprune-tower", "shared")
    yield server
    stop_server(server)


def ask(url: str, pictures: list[Image.Image], headers: dict[str, str] | None = None) -> list[Any]:
    """All at once, each over a connection of its own, so that every API process takes some."""
    with ThreadPoolExecutor(len(pictures)) as pool:
        return list(pool.map(lambda picture: post(url, chat_body(picture), headers), pictures))


def tower(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/health", timeout=30).json()["tower"]
    return found


def towers(server: LiveServer) -> list[int]:
    """The tower processes that run."""
    name = "vllm_vtprune.vision.shared.process"
    return [process.pid for process in server.members() if name in process.cmdline()]


def serving_processes(server: LiveServer) -> set[str]:
    """The API processes that have counted vision tokens, by their files of metrics."""
    folders = {process.environ().get("PROMETHEUS_MULTIPROC_DIR", "") for process in server.members()}
    found = set()
    for path in Path(max(folders)).glob("counter_*.db"):
        values = MmapedDict.read_all_values_from_file(str(path))
        if any('"vtprune_vision_tokens_total"' in key and value for key, value, *_ in values):
            found.add(path.stem)
    return found


def test_both_api_processes_answer_as_a_server_with_one_does(shared: LiveServer, server: str) -> None:
    pictures = [scene(i) for i in range(24)]
    for headers in (None, BALANCED):
        found = ask(shared.url, pictures, headers)
        expected = ask(server, pictures, headers)
        assert [told(response) for response in found] == [told(response) for response in expected]
    assert len(serving_processes(shared)) == 2
    assert towers(shared) == [tower(shared.url)["pid"]]


def test_the_towers_metrics_are_counted_once(shared: LiveServer) -> None:
    images = metric(shared.url, "vtprune_tower_batch_size_sum")
    pictures = [scene(i) for i in range(100, 116)]
    for _ in range(2):
        assert all(counts(response)["vision_tokens"] == N for response in ask(shared.url, pictures))
    # a pass is told with the next answer to anyone
    post(shared.url, chat_body(scene(200)))
    assert 16 <= metric(shared.url, "vtprune_tower_batch_size_sum") - images <= 17
    assert metric(shared.url, "vtprune_tower_waiting_images") == 0
    assert metric(shared.url, "vtprune_tower_cache_bytes") > 0


def test_explaining_and_the_configuration_work_with_a_tower_elsewhere(shared: LiveServer) -> None:
    config = httpx.get(f"{shared.url}/vtprune/config", timeout=30).json()
    assert config["policy"]["tower"] == "shared" and config["model"]["encoder_device"] == "cpu"


def test_a_tower_that_is_killed_is_started_again_and_no_answer_is_lost(
    shared: LiveServer, server: str
) -> None:
    before = tower(shared.url)
    pictures = [scene(i) for i in range(300, 316)]
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(ask, shared.url, pictures, BALANCED)
        os.kill(before["pid"], signal.SIGKILL)
        found = under_way.result()
    expected = ask(server, pictures, BALANCED)
    assert [told(response) for response in found] == [told(response) for response in expected]
    now = tower(shared.url)
    assert now["state"] == "running" and now["pid"] != before["pid"]
    assert now["restarts"] == before["restarts"] + 1
    assert towers(shared) == [now["pid"]]


def test_health_says_that_a_tower_is_missing_and_has_it_started(shared: LiveServer) -> None:
    before = tower(shared.url)
    os.kill(before["pid"], signal.SIGKILL)
    psutil.wait_procs([psutil.Process(before["pid"])] if psutil.pid_exists(before["pid"]) else [], timeout=1)
    response = httpx.get(f"{shared.url}/health", timeout=30)
    assert response.status_code == 503
    assert response.json()["tower"]["state"] == "restarting"
    while httpx.get(f"{shared.url}/health", timeout=30).status_code == 503:
        pass
    assert tower(shared.url)["restarts"] == before["restarts"] + 1
    assert answer(post(shared.url, chat_body(scene(7))))
