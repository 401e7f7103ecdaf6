# SPDX-License-Identifier: Apache-2.0
"""vLLM's own server with the plugin named in VLLM_PLUGINS serves the same contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import DEMO_MODEL, MODEL_NAME, LiveServer, start_server, stop_server
from tests.pictures import noise, scene
from tests.server.client import chat_body, metric, post
from tests.server.test_contract import N, answer, counts

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = start_server(
        tmp_path_factory.mktemp("plain") / "server.log",
        *("--model", str(DEMO_MODEL), "--served-model-name", MODEL_NAME, "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8", "--api-key", "secret"),
        # room for two of the model's pictures, unpruned
        *("--mm-processor-cache-gb", "0.00016"),
        *("--additional-config", '{"vtprune": {"default_preset": "balanced", "max_aggressiveness": 0.8}}'),
        module="vllm.entrypoints.launchers.api_server.entry",
        env={"VLLM_PLUGINS": "vtprune"},
    )
    yield server
    stop_server(server)


KEY = {"Authorization": "Bearer secret"}


def test_the_contract_holds(plain_server: LiveServer) -> None:
    assert post(plain_server.url, chat_body(scene())).status_code == 401
    default = post(plain_server.url, chat_body(scene()), KEY)
    assert counts(default)["vision_tokens_kept"] < N
    off = post(plain_server.url, chat_body(scene()), {**KEY, "X-VTPrune-Preset": "off"})
    assert counts(off)["vision_tokens_kept"] == N
    assert answer(off)
    capped = post(plain_server.url, chat_body(scene()), {**KEY, "X-VTPrune-Aggressiveness": "0.9"})
    assert capped.status_code == 400
    assert "max_aggressiveness" in capped.json()["error"]["message"]
    assert httpx.get(f"{plain_server.url}/health", timeout=20).status_code == 200


def test_an_image_that_the_engine_lost_is_sent_again(plain_server: LiveServer) -> None:
    url = plain_server.url

    def ask(number: int, **fields: Any) -> httpx.Response:
        return post(url, chat_body(noise(number), vtprune={"preset": "off"}, **fields), KEY)

    first = ask(1)
    assert ask(2).status_code == 200
    # Refused after its image was processed: the front end forgets image 2, the engine still has 1 and 2.
    assert ask(2, logit_bias={"999999": 1}).status_code == 400
    assert ask(3).status_code == 200  # the front end now knows 1 and 3; the engine has 2 and 3
    before = metric(url, "vtprune_images_resent_total")
    again = ask(1)
    assert again.status_code == 200
    assert answer(again) == answer(first)
    assert metric(url, "vtprune_images_resent_total") == before + 1
