# SPDX-License-Identifier: Apache-2.0
"""Requests made from the server's OpenAPI, our headers and body field included: no 5xx, no dead engine."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode

from tests.conftest import MODEL_NAME, LiveServer
from tests.helpers.client import chat_body, post, told
from tests.helpers.pictures import data_url, scene

pytestmark = pytest.mark.engine

#: Where the contract is at work, and what vLLM serves besides.
OURS = [
    "POST /v1/chat/completions",
    "POST /v1/chat/completions/batch",
    "POST /v1/completions",
    "POST /v1/responses",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /tokenize",
    "POST /invocations",
    "POST /vtprune/explain",
    "GET /vtprune/config",
]
OTHERS = [
    "POST /v1/chat/completions/render",
    "POST /v1/completions/render",
    "POST /v1/responses/render",
    "POST /v1/messages/render",
    "POST /inference/v1/generate",
    "POST /detokenize",
    "POST /generative_scoring",
    "POST /is_scaling_elastic_ep",
    "POST /v1/responses/{response_id}/cancel",
    "GET /v1/responses/{response_id}",
    "GET /v1/models",
    "GET /load",
    "GET /version",
    "GET /kv_event_sources",
    "GET /health",
    "GET /metrics",
    "GET /ping",
    "POST /ping",
]
#: Changes the number of engines; answers 501 for models of this kind.
LEFT_OUT = ["POST /scale_elastic_ep", "POST /v1/systemone"]
#: `/invocations` takes any route's body and has no schema of its own.
BODY_OF = {"POST /invocations": "POST /v1/chat/completions"}
PLAIN = ["GET /vtprune/config"]
EXAMPLES = dict.fromkeys(OURS, 25) | dict.fromkeys(OTHERS, 4)
# its schema nests chat requests, which takes the generator long
EXAMPLES["POST /v1/chat/completions/batch"] = 6
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
PICTURE = data_url(scene())
HELLO = [{"role": "user", "content": "what color is the circle ?"}]


@pytest.fixture(scope="module")
def api(server: str) -> Any:
    return schemathesis.openapi.from_url(f"{server}/openapi.json")


def bounded(body: Any, path: str) -> Any:
    """The body with answers of a few tokens, a model that exists and, mostly, a prompt with a picture.

    A request that fails at its first field says nothing of what lies behind it.
    """
    if not isinstance(body, dict):
        return body
    for field in LENGTHS:
        if isinstance(body.get(field), int) and not isinstance(body[field], bool):
            body[field] = min(body[field], 4)
    for field in ("n", "best_of"):
        if isinstance(body.get(field), int):
            body[field] = min(body[field], 2)
    chooser = random.Random(repr(body))
    if "messages" in body and chooser.random() < 0.8:
        # Anthropic's messages have pictures of another form
        body["messages"] = chat_body(PICTURE)["messages"] if "messages" not in path else HELLO
    if "image_url" in body and chooser.random() < 0.8:
        body["image_url"] = PICTURE
    if "model" in body and chooser.random() < 0.9:
        body["model"] = MODEL_NAME
    if ("messages" in body or "prompt" in body or "input" in body) and not any(f in body for f in LENGTHS):
        body |= dict.fromkeys(LENGTHS[:3], 4)
    return body


def test_the_schema_holds_nothing_else(api: Any) -> None:
    operations = {result.ok().label for result in api.get_all_operations()}
    assert operations == {*OURS, *OTHERS, *LEFT_OUT}


CASES = [(operation, GenerationMode.POSITIVE) for operation in EXAMPLES]
# nonsense on its own routes is for vLLM to judge; without parameters there is nothing to get wrong
CASES += [(operation, GenerationMode.NEGATIVE) for operation in OURS if operation not in PLAIN]


@pytest.mark.parametrize("operation,mode", CASES, ids=lambda value: getattr(value, "value", value))
def test_nothing_is_a_server_error(
    api: Any, live_server: LiveServer, operation: str, mode: GenerationMode
) -> None:
    path = operation.split(" ")[1]
    method, described_at = BODY_OF.get(operation, operation).split(" ")

    @given(case=api[described_at][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES[operation],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    def send(case: schemathesis.Case) -> None:
        case.body = bounded(case.body, path)
        request = case.as_transport_kwargs(base_url=live_server.url)
        request["url"] = request["url"].replace(described_at, path)
        response = requests.request(**request, timeout=120)
        assert response.status_code < 500, (response.text[:500], case.as_curl_command()[:2000])

    send()
    assert live_server.healthy()


def test_a_good_request_is_answered_afterwards(live_server: LiveServer) -> None:
    status, text, _ = told(post(live_server.url, chat_body(scene())))
    assert status == 200 and text
    assert httpx.get(f"{live_server.url}/vtprune/config", timeout=30).status_code == 200
