# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes a real server, and every panel of the dashboard shows something."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import MODEL_NAME
from tests.deploy.manifests import DEPLOY, only, overlay
from tests.deploy.prometheus import prometheus
from tests.helpers.client import chat_body, metric, post
from tests.helpers.pictures import noise, scene

pytestmark = pytest.mark.engine

PANELS = [
    panel
    for panel in json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    if panel["type"] != "row"
]
Query = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def query(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Query]:
    """Asks a Prometheus that has scraped some traffic of every kind."""
    if shutil.which("prometheus") is None:
        pytest.skip("Prometheus is not installed (Debian: apt-get install prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copy(DEPLOY / "prometheus" / "rules.yaml", folder)
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    configuration["scrape_configs"][0]["static_configs"][0]["targets"] = [server.removeprefix("http://")]
    with prometheus(configuration, folder) as running:
        _wait_until(lambda: running.samples("up") != [], folder)
        _traffic(server)  # labels are there from now on, and rates need what comes after
        time.sleep(2)
        _traffic(server)
        total = metric(server, "vtprune_requests_total")
        _wait_until(lambda: running.query("sum(vtprune_requests_total)") == total, folder)
        time.sleep(1)
        yield running.samples


def _wait_until(true: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if true():
                return
        time.sleep(0.3)
    raise AssertionError((folder / "prometheus.log").read_text()[-3000:])


def _traffic(server: str) -> None:
    """Something for each panel: presets, both stages, refusals, a picture again."""
    seed = int(time.monotonic() * 1000) % 10**6
    for preset in ("off", "light", "balanced", "aggressive", "auto"):
        assert post(server, chat_body(noise(seed), vtprune={"preset": preset})).status_code == 200
    assert post(server, chat_body(question="what")).status_code == 200
    assert post(server, chat_body(scene(), vtprune={"kv_keep": 0.5})).status_code == 200
    assert post(server, chat_body(scene(), vtprune={"aggressiveness": 7})).status_code == 400
    assert post(server, chat_body("http://127.0.0.1:1/x.png")).status_code == 400


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_shows_a_number(query: Query, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        # holds the traffic, however long ago it was
        expression = target["expr"].replace("$__rate_interval", "1h").replace("$job", "vtprune")
        values = [float(series["value"][1]) for series in query(expression)]
        assert values and any(math.isfinite(value) for value in values), expression


def test_a_healthy_server_raises_no_alert(query: Query) -> None:
    assert [alert["metric"] for alert in query('ALERTS{alertname!="VTPruneRefusals"}')] == []


def test_what_scaling_asks_for_is_there(query: Query) -> None:
    for trigger in only(overlay("replicas"), "ScaledObject")["spec"]["triggers"]:
        expression = trigger["metadata"]["query"].replace(', namespace="vtprune"', "")
        assert expression != trigger["metadata"]["query"]
        (series,) = query(expression)
        assert float(series["value"][1]) >= 0


def test_the_ingress_leads_to_routes_that_the_server_has(server: str) -> None:
    (rule,) = only(overlay("replicas"), "Ingress")["spec"]["rules"]
    known = httpx.get(f"{server}/openapi.json", timeout=30).json()["paths"]
    for path in rule["http"]["paths"]:
        assert path["path"] in known, path
    assert MODEL_NAME in httpx.get(f"{server}/v1/models", timeout=30).text
