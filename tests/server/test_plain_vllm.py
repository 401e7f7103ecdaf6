# SPDX-License-Identifier: Apache-2.0
"""vLLM's own server with the plugin named in VLLM_PLUGINS serves the same contract."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.conftest import DEMO_MODEL, MODEL_NAME, LiveServer, start_server, stop_server
from tests.pictures import scene
from tests.server.client import chat_body, post
from tests.server.test_contract import N, answer, counts

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = start_server(
        tmp_path_factory.mktemp("plain") / "server.log",
        *("--model", str(DEMO_MODEL), "--served-model-name", MODEL_NAME, "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8", "--api-key", "secret"),
        *("--additional-config", '{"vtprune": {"default_preset": "balanced", "max_aggressiveness": 0.8}}'),
        module="vllm.entrypoints.launchers.api_server.entry",
        env={"VLLM_PLUGINS": "vtprune"},
    )
    yield server
    stop_server(server)


def test_the_contract_holds(plain_server: LiveServer) -> None:
    key = {"Authorization": "Bearer secret"}
    assert post(plain_server.url, chat_body(scene())).status_code == 401
    default = post(plain_server.url, chat_body(scene()), key)
    assert counts(default)["vision_tokens_kept"] < N
    off = post(plain_server.url, chat_body(scene()), {**key, "X-VTPrune-Preset": "off"})
    assert counts(off)["vision_tokens_kept"] == N
    assert answer(off)
    capped = post(plain_server.url, chat_body(scene()), {**key, "X-VTPrune-Aggressiveness": "0.9"})
    assert capped.status_code == 400
    assert "max_aggressiveness" in capped.json()["error"]["message"]
    assert httpx.get(f"{plain_server.url}/health", timeout=20).status_code == 200
