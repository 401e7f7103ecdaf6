# SPDX-License-Identifier: Apache-2.0
"""The OpenAI Python client, as users have it."""

from __future__ import annotations

from typing import Any, cast

import openai
import pytest

from tests.conftest import MODEL_NAME
from tests.helpers.client import chat_body
from tests.helpers.pictures import scene

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60)


def request(**changes: Any) -> Any:
    return {**chat_body(scene()), **changes}


def test_chat_with_extra_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        **request(), extra_headers={"X-VTPrune-Aggressiveness": "0.5"}
    )
    usage = raw.parse().usage
    assert usage is not None and usage.model_extra is not None
    counts = usage.model_extra["vtprune"]
    assert 1 <= counts["vision_tokens_kept"] < counts["vision_tokens"] == 144
    assert raw.headers["X-VTPrune-Vision-Tokens-Kept"] == str(counts["vision_tokens_kept"])
    assert usage.prompt_tokens == counts["kv_tokens"]


def test_chat_with_extra_body(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**request(), extra_body={"vtprune": {"keep_ratio": 0.5}})
    assert answer.usage is not None and answer.usage.model_extra is not None
    assert answer.usage.model_extra["vtprune"]["vision_tokens_kept"] == 72
    assert answer.choices[0].message.content


def test_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**request(), extra_body={"vtprune": {"keep_ratio": 0.5}})
    stream = client.chat.completions.create(
        **request(stream=True, stream_options={"include_usage": True}),
        extra_body={"vtprune": {"keep_ratio": 0.5}},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_model_names(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert f"{MODEL_NAME}:balanced" in names
    answer = client.chat.completions.create(**request(model=f"{MODEL_NAME}:balanced"))
    assert answer.usage is not None and answer.usage.model_extra is not None
    assert answer.usage.model_extra["vtprune"]["vision_tokens_kept"] < 144


def test_responses(client: openai.OpenAI) -> None:
    part = {
        "type": "input_image",
        "image_url": chat_body(scene())["messages"][0]["content"][0]["image_url"]["url"],
    }
    content: Any = [part, {"type": "input_text", "text": "what color is the circle ?"}]
    answer = client.responses.create(
        model=MODEL_NAME,
        input=[{"role": "user", "content": content}],
        max_output_tokens=4,
        extra_headers={"X-VTPrune-Keep-Ratio": "0.5"},
    )
    assert answer.usage is not None and answer.usage.model_extra is not None
    assert answer.usage.model_extra["vtprune"]["vision_tokens_kept"] == 72


def test_responses_go_on_from_a_refusal_and_from_an_empty_answer(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "what color is the circle ?"}
    answers: list[list[dict[str, Any]]] = [[{"type": "refusal", "refusal": "no"}], []]
    for content in answers:
        before = {
            "type": "message",
            "id": "m",
            "status": "completed",
            "role": "assistant",
            "content": content,
        }
        answer = client.responses.create(
            model=MODEL_NAME, input=cast(Any, [question, before, question]), max_output_tokens=4
        )
        assert answer.output_text


def test_errors_are_its_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**request(), extra_headers={"X-VTPrune-Aggressiveness": "2"})
    assert bad.value.param == "X-VTPrune-Aggressiveness" and "[0, 1]" in bad.value.message
    with pytest.raises(openai.BadRequestError) as field:
        client.chat.completions.create(**request(), extra_body={"vtprune": {"nope": 1}})
    assert field.value.param == "vtprune.nope"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**request(model="nope"))
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(**chat_body("http://nowhere.invalid/x.png"))
