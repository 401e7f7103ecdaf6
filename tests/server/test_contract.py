# SPDX-License-Identifier: Apache-2.0
"""The contract at the front door: a real server process, a real engine, real HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.conftest import MODEL_NAME, LiveServer
from tests.helpers.client import (
    QUESTION,
    TEXT,
    N,
    answer,
    chat_body,
    counts,
    messages_body,
    metric,
    post,
    streamed,
)
from tests.helpers.pictures import data_url, encoded, noise, scene

pytestmark = pytest.mark.engine


def test_without_headers_nothing_is_pruned(server: str) -> None:
    usage = counts(response := post(server, chat_body(scene())))
    assert usage["vision_tokens"] == usage["vision_tokens_kept"] == N
    assert response.json()["usage"]["prompt_tokens"] == usage["kv_tokens"] == N + TEXT


@pytest.mark.parametrize("source", ["header", "body"])
def test_a_request_decides_how_hard_it_is_pruned(server: str, source: str) -> None:
    kept = []
    for aggressiveness in (0, 0.5, 1):
        if source == "header":
            response = post(server, chat_body(scene()), {"x-vtprune-aggressiveness": str(aggressiveness)})
        else:
            response = post(server, chat_body(scene(), vtprune={"aggressiveness": aggressiveness}))
        usage = counts(response)
        assert response.json()["usage"]["prompt_tokens"] == usage["vision_tokens_kept"] + TEXT
        kept.append(usage["vision_tokens_kept"])
    assert kept[0] == N > kept[1] > kept[2] == 1


def test_a_header_wins_over_the_body(server: str) -> None:
    body = chat_body(scene(), vtprune={"keep_ratio": 0.5})
    assert counts(post(server, body, {"X-VTPrune-Keep-Ratio": "0.25"}))["vision_tokens_kept"] == 36


def test_several_pictures_each_have_their_count(server: str) -> None:
    pictures = [scene(), noise(5), scene(50)]
    settings = {"X-VTPrune-Aggressiveness": "0.5"}
    alone = [counts(post(server, chat_body(p), settings))["vision_tokens_kept"] for p in pictures]
    together = counts(post(server, chat_body(*pictures), settings))
    assert together["vision_tokens"] == 3 * N
    assert together["vision_tokens_kept"] == sum(alone)


def test_mixed_settings_for_one_picture_in_flight_together(server: str) -> None:
    values = [0.0, 0.3, 0.5, 0.7, 1.0] * 3
    picture = scene(17)

    def ask(aggressiveness: float) -> tuple[int, str]:
        response = post(server, chat_body(picture), {"X-VTPrune-Aggressiveness": str(aggressiveness)})
        return counts(response)["vision_tokens_kept"], answer(response)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, values))
    assert together == [ask(value) for value in values]
    assert len({kept for kept, _ in together}) >= 4


def test_the_same_request_hits_vllms_cache_and_another_setting_does_not(server: str) -> None:
    body, settings = chat_body(noise(41)), {"X-VTPrune-Aggressiveness": "0.5"}
    with httpx.Client() as client:  # each API process has a cache
        first = post(server, body, settings, client=client)
        hits = metric(server, "vllm:mm_cache_hits_total")
        queries = metric(server, "vllm:mm_cache_queries_total")
        again = post(server, body, settings, client=client)
        assert metric(server, "vllm:mm_cache_hits_total") == hits + 1
        other = post(server, body, {"X-VTPrune-Aggressiveness": "0.6"}, client=client)
    assert metric(server, "vllm:mm_cache_hits_total") == hits + 1
    assert metric(server, "vllm:mm_cache_queries_total") == queries + 2
    assert answer(first) == answer(again) and counts(first) == counts(again)
    assert counts(other)["vision_tokens_kept"] <= counts(first)["vision_tokens_kept"]


def test_a_stream_carries_the_same_numbers(server: str) -> None:
    body = chat_body(scene(), stream=True, stream_options={"include_usage": True})
    settings = {"X-VTPrune-Aggressiveness": "0.5"}
    plain = post(server, chat_body(scene()), settings)
    with httpx.stream(
        "POST", f"{server}/v1/chat/completions", json=body, headers=settings, timeout=60
    ) as stream:
        assert int(stream.headers["X-VTPrune-Vision-Tokens-Kept"]) == counts(plain)["vision_tokens_kept"]
        text, usage = streamed(stream)
    assert text == answer(plain)
    assert usage and usage["vtprune"] == counts(plain)
    assert usage["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]


def test_text_alone_works_with_and_without_headers(server: str) -> None:
    plain, pruned = post(server, chat_body()), post(server, chat_body(), {"X-VTPrune-Preset": "aggressive"})
    assert answer(plain) == answer(pruned)
    assert counts(plain)["vision_tokens"] == 0


def test_n_choices_and_logprobs(server: str) -> None:
    body = chat_body(scene(), n=3, temperature=1, logprobs=True, top_logprobs=2)
    response = post(server, body, {"X-VTPrune-Preset": "light"})
    assert len(response.json()["choices"]) == 3
    assert counts(response)["vision_tokens"] == N


PICTURES = {
    "1x1": Image.new("RGB", (1, 1), (255, 0, 0)),
    "30 megapixels": Image.new("RGB", (6000, 5000), (20, 200, 20)),
    "palette": scene().convert("P"),
    "rgba": scene().convert("RGBA"),
    "grey": scene().convert("L"),
    "grey with alpha": scene().convert("LA"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_all_kinds_are_served(server: str, name: str) -> None:
    assert (
        counts(post(server, chat_body(PICTURES[name]), {"X-VTPrune-Preset": "balanced"}))["vision_tokens"]
        == N
    )


PNG = encoded(scene())
BAD_PICTURES = {
    "truncated": data_url(PNG[: len(PNG) // 2]),
    "not an image": data_url(b"hello world"),
    "wrong type": data_url(PNG, mime="text/html"),
    "bad base64": "data:image/png;base64,@@@@",
    "empty": "data:image/png;base64,",
    "no url": "",
    "unknown scheme": "gopher://example.invalid/a.png",
}
BAD_HEADERS: dict[str, tuple[Any, str]] = {
    "out of range": ([("X-VTPrune-Aggressiveness", "1.5")], "X-VTPrune-Aggressiveness"),
    "NaN": ([("X-VTPrune-KV-Keep", "nan")], "X-VTPrune-KV-Keep"),
    "unknown method": ([("X-VTPrune-Method", "magic")], "X-VTPrune-Method"),
    "unknown header": ([("X-VTPrune-Strength", "1")], "x-vtprune-strength"),
    "repeated": ([("X-VTPrune-Preset", "off"), ("X-VTPrune-Preset", "off")], "X-VTPrune-Preset"),
    "excluding": (
        [("X-VTPrune-Keep-Ratio", "0.5"), ("X-VTPrune-Aggressiveness", "0.5")],
        "X-VTPrune-Keep-Ratio",
    ),
}
BAD_BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"vtprune": {"strength": 1}}, "vtprune.strength"),
    "not an object": ({"vtprune": "balanced"}, "vtprune"),
    "text for a number": ({"vtprune": {"aggressiveness": "0.5"}}, "vtprune.aggressiveness"),
    "the processor's key": ({"mm_processor_kwargs": {"vtprune": "off"}}, "mm_processor_kwargs"),
}


def is_refused_and_harmless(live: LiveServer, response: httpx.Response, param: str | None = None) -> None:
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["message"] and error["type"]
    assert param is None or error["param"] == param
    assert live.healthy()
    assert answer(post(live.url, chat_body(scene()), {"X-VTPrune-Aggressiveness": "0.5"})).strip() == "red"


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures_are_refused(live_server: LiveServer, name: str) -> None:
    is_refused_and_harmless(live_server, post(live_server.url, chat_body(BAD_PICTURES[name])))


def test_an_empty_url_is_said_to_be_one(server: str) -> None:
    assert "URL is empty" in post(server, chat_body("")).json()["error"]["message"]


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_refused_and_named(live_server: LiveServer, name: str) -> None:
    headers, param = BAD_HEADERS[name]
    is_refused_and_harmless(live_server, post(live_server.url, chat_body(scene()), headers), param)


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_refused_and_named(live_server: LiveServer, name: str) -> None:
    fields, param = BAD_BODIES[name]
    is_refused_and_harmless(live_server, post(live_server.url, chat_body(scene(), **fields)), param)


def test_too_many_pictures_and_too_long_a_prompt_are_refused(live_server: LiveServer) -> None:
    many = post(live_server.url, chat_body(*[scene(i) for i in range(9)]))
    is_refused_and_harmless(live_server, many)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions/batch", {"messages": [chat_body(scene())["messages"]] * 2, "max_tokens": 2}),
        ("/invocations", chat_body(scene())),
        (
            "/v1/responses",
            {
                "max_output_tokens": 4,
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_image", "image_url": data_url(scene())},
                            {"type": "input_text", "text": QUESTION},
                        ],
                    }
                ],
            },
        ),
        ("/v1/messages", messages_body(scene())),
    ],
)
@pytest.mark.parametrize("source", ["header", "body"])
def test_every_route_that_takes_pictures_prunes(server: str, path: str, body: Any, source: str) -> None:
    body = {"model": MODEL_NAME, **body}
    chat = counts(post(server, chat_body(scene()), {"X-VTPrune-Aggressiveness": "0.5"}))
    if source == "header":
        response = post(server, body, {"X-VTPrune-Aggressiveness": "0.5"}, path)
    else:
        response = post(server, {**body, "vtprune": {"aggressiveness": 0.5}}, None, path)
    pictures = 2 if path.endswith("batch") else 1
    assert counts(response)["vision_tokens_kept"] == pictures * chat["vision_tokens_kept"]


def test_tokenize_counts_without_generating(server: str) -> None:
    body = chat_body(scene())
    chat = counts(post(server, body, {"X-VTPrune-Aggressiveness": "0.5"}))
    tokenized = post(
        server,
        {"model": MODEL_NAME, "messages": body["messages"]},
        {"X-VTPrune-Aggressiveness": "0.5"},
        "/tokenize",
    )
    assert tokenized.json()["count"] == chat["kv_tokens"]
    assert tokenized.json()["vtprune"] == chat


def test_the_rest_of_the_api_is_vllms(server: str) -> None:
    models = httpx.get(f"{server}/v1/models", timeout=30).json()
    assert MODEL_NAME in [model["id"] for model in models["data"]]
    assert post(server, {**chat_body(), "model": "nope"}).status_code == 404
    assert httpx.get(f"{server}/version", timeout=30).json()["version"].startswith("0.32")


def test_openapi_documents_headers_and_body_field(server: str) -> None:
    document = httpx.get(f"{server}/openapi.json", timeout=60).json()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {p["name"] for p in chat["parameters"]} >= {"X-VTPrune-Preset", "X-VTPrune-KV-Keep"}
    reference = chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
    assert "vtprune" in document["components"]["schemas"][reference]["properties"]
