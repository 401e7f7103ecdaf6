# SPDX-License-Identifier: Apache-2.0
"""vLLM's own server with the plugin named in VLLM_PLUGINS serves the same contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import (
    DEMO_MODEL,
    MODEL_NAME,
    REPOSITORY,
    LiveServer,
    python_path,
    start_server,
    stop_server,
)
from tests.helpers.client import N, answer, chat_body, counts, metric, post
from tests.helpers.pictures import noise, scene
from tests.helpers.vllm_with_a_fault import FAULT, FAULTY_SEED
from vtprune_server.client_errors import GENERIC_ERROR

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
        module="tests.helpers.vllm_with_a_fault",
        env={
            "VLLM_PLUGINS": "vtprune",
            "VTPRUNE_WITHHOLD_ERROR_TEXT": "1",
            "PYTHONPATH": python_path(REPOSITORY),
        },
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


@pytest.mark.parametrize("number,fields", [(1, {}), (4, {"use_beam_search": True, "n": 2})])
def test_an_image_that_the_engine_lost_is_sent_again(
    plain_server: LiveServer, number: int, fields: dict[str, Any]
) -> None:
    url = plain_server.url

    def ask(number: int, **fields: Any) -> httpx.Response:
        return post(url, chat_body(noise(number), vtprune={"preset": "off"}, **fields), KEY)

    # Refused after its image was processed: the front end takes it for known, the engine has never seen it.
    assert ask(number, logit_bias={"999999": 1}).status_code == 400
    before = metric(url, "vtprune_images_resent_total")
    lost = ask(number, **fields)
    assert lost.status_code == 200
    assert metric(url, "vtprune_images_resent_total") == before + 1
    assert ask(2).status_code == ask(3).status_code == 200  # there is room for two: image 1 is evicted
    assert answer(lost) == answer(ask(number, **fields))


@pytest.mark.parametrize("stream", [True, False])
def test_an_unforeseen_error_is_logged_without_its_text(plain_server: LiveServer, stream: bool) -> None:
    response = post(plain_server.url, chat_body(scene(), stream=stream, seed=FAULTY_SEED), KEY)
    assert response.status_code == (200 if stream else 500)
    assert FAULT not in response.text
    assert GENERIC_ERROR in response.text
    log = plain_server.log.read_text(errors="replace")
    assert FAULT not in log
    assert "RuntimeError (--log-error-stack shows its text)" in log
    assert ("Error in chat completion stream generator" if stream else "error in POST /v1/chat") in log
    assert answer(post(plain_server.url, chat_body(scene()), KEY))
