# SPDX-License-Identifier: Apache-2.0
"""The API key on Ray Serve: from the nodes' environment, and nowhere to be read."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import httpx
import pytest

from tests.deploy.nodes import namespaces_allowed
from tests.helpers.client import chat_body, post
from tests.helpers.pictures import scene

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def test_every_route_asks_for_the_key_and_the_dashboard_does_not_tell_it(warm: Path) -> None:
    from tests.deploy.ray_cluster import ray_cluster, serve_file

    if not namespaces_allowed():
        pytest.skip("a second cluster needs a network namespace, which is refused here")
    key = secrets.token_hex(16)
    with ray_cluster(warm, 1, {"VLLM_API_KEY": key}) as cluster:
        cluster.serve(serve_file(num_replicas=1), 1)
        url, authorization = cluster.url(0), {"Authorization": f"Bearer {key}"}
        for path in ("/v1/models", "/vtprune/config", "/vtprune/metrics-targets"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, headers=authorization).status_code == 200
        assert post(url, chat_body(scene())).status_code == 401
        assert post(url, chat_body(scene()), authorization).status_code == 200
        for path in ("/metrics", "/health", "/-/healthz"):  # what probes and Prometheus ask
            assert httpx.get(url + path).status_code == 200
        assert key not in json.dumps(cluster.api("/api/serve/applications/"))
        assert key not in cluster.logs()
