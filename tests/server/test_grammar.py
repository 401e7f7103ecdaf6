# SPDX-License-Identifier: Apache-2.0
"""Structured outputs on a model whose vocabulary cannot spell them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from tests.conftest import LiveServer
from tests.helpers.client import CHAT, answer, chat_body, post
from tests.helpers.pictures import scene
from vtprune_server.grammar import UNSPELLABLE, install_grammar_errors

#: In no vocabulary of words.
REGEX = {"structured_outputs": {"regex": "☃☃"}}


@pytest.mark.engine
@pytest.mark.parametrize("settings", [{"preset": "off"}, {"preset": "balanced"}], ids=str)
def test_what_cannot_be_spelt_is_a_sentence(live_server: LiveServer, settings: dict[str, str]) -> None:
    response = post(live_server.url, chat_body(scene(), vtprune=settings, **REGEX))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"].startswith(UNSPELLABLE) and error["param"] == "structured_outputs"
    body = chat_body(scene(), stream=True, vtprune=settings, **REGEX)
    with httpx.stream("POST", live_server.url + CHAT, json=body, timeout=60) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: {")]
    assert json.loads(lines[-1])["error"]["message"].startswith(UNSPELLABLE)
    assert live_server.healthy()


@pytest.mark.engine
def test_words_that_the_model_knows_can_be_chosen_among(live_server: LiveServer) -> None:
    body = chat_body(scene(), structured_outputs={"choice": ["blue", "red"]})
    assert answer(post(live_server.url, body)).strip() in ("blue", "red")


def output(*tokens: int, finish: str | None) -> RequestOutput:
    completion = CompletionOutput(0, "", list(tokens), None, None, finish_reason=finish)
    return RequestOutput("r", None, [1], None, [completion], finish is not None)


@pytest.mark.parametrize(
    "structured,last,refused",
    [
        (True, output(0, finish="error"), True),
        (True, output(0, finish="stop"), False),
        # failed before its first token: not the grammar's doing
        (True, output(finish="error"), False),
        (False, output(0, finish="error"), False),
    ],
)
def test_only_what_the_grammar_rejected_is_blamed_on_it(
    structured: bool, last: RequestOutput, refused: bool
) -> None:
    async def generate(prompt: Any, params: Any, request_id: str) -> AsyncGenerator[RequestOutput, None]:
        yield output(7, finish=None)
        yield last

    engine = SimpleNamespace(generate=generate)
    install_grammar_errors(engine)
    asked = StructuredOutputsParams(regex="a") if structured else None

    async def collect() -> list[RequestOutput]:
        params = SamplingParams(structured_outputs=asked)
        return [one async for one in engine.generate("prompt", params, request_id="r")]

    if refused:
        with pytest.raises(VLLMValidationError, match="vocabulary"):
            asyncio.run(collect())
    else:
        assert asyncio.run(collect())[-1] is last
