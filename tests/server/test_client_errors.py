# SPDX-License-Identifier: Apache-2.0
"""A client reads what was written for it, and nothing of the server's inside."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from jinja2 import TemplateError
from vllm import SamplingParams
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GenerationError, VLLMNotFoundError, VLLMValidationError

from vllm_vtprune.settings import Controls
from vtprune_server.client_errors import (
    GENERIC_ERROR,
    GENERIC_REFUSAL,
    disclosable,
    disclose_in_messages,
    disclose_in_streams,
)


class Model(pydantic.BaseModel):
    number: int


def raised(action: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


@pytest.mark.parametrize(
    "action",
    [
        lambda: SamplingParams(temperature=-1),
        lambda: Controls.from_mapping({"kv_keep": 9}),
        lambda: Model(number="x"),  # type: ignore[arg-type]
    ],
)
def test_sentences_about_the_request_are_told(action: Callable[[], Any]) -> None:
    error = raised(action)
    assert isinstance(error, ValueError | VLLMValidationError)
    assert disclosable(error) is error


@pytest.mark.parametrize(
    "error", [VLLMValidationError("a"), VLLMNotFoundError("b"), GenerationError("c"), TemplateError("d")]
)
def test_errors_made_for_clients_are_told(error: Exception) -> None:
    assert disclosable(error) is error


@pytest.mark.parametrize(
    "action",
    [
        lambda: np.zeros(3).reshape(2, 2),
        lambda: torch.zeros(2) + "secret",  # type: ignore[operator]
        lambda: int("secret"),
        lambda: json.loads("secret"),
        lambda: Controls.from_headers(7),  # type: ignore[arg-type]
    ],
)
def test_a_librarys_words_are_not(action: Callable[[], Any]) -> None:
    error = disclosable(raised(action))
    assert isinstance(error, VLLMValidationError)
    assert str(error) == GENERIC_REFUSAL


def test_what_is_no_400_is_left_to_its_handler() -> None:
    error = raised(lambda: {}["secret"])  # type: ignore[index]
    assert disclosable(error) is error


async def test_streams_tell_no_more() -> None:
    async def broken() -> AsyncIterator[Any]:
        raise KeyError("secret")
        yield

    handler = object.__new__(
        OpenAIServingChat
    )  # what its constructor reads off an engine is not asked for here
    for name in ("enable_force_include_usage", "enable_auto_tools", "_include_reasoning_tokens_details"):
        setattr(handler, name, False)
    handler.parser_cls = None
    disclose_in_streams([object(), handler])
    request = ChatCompletionRequest(messages=[], model="m", stream=True)
    metadata = RequestResponseMetadata(request_id="r")
    stream = handler.chat_completion_stream_generator(request, broken(), "r", "m", [], None, metadata)  # type: ignore[arg-type]
    said = "".join([event async for event in stream])
    assert GENERIC_ERROR in said and said.endswith("data: [DONE]\n\n")
    assert "secret" not in said


def test_a_streams_own_sentences_are_told() -> None:
    handler = object.__new__(OpenAIServingChat)
    disclose_in_streams([handler])
    assert GENERIC_REFUSAL in handler.create_streaming_error_response(raised(lambda: int("secret")))
    assert "As it is" in handler.create_streaming_error_response("As it is")


async def test_streams_of_the_messages_api_tell_no_more() -> None:
    async def broken() -> AsyncIterator[str]:
        raise KeyError("secret")
        yield

    disclose_in_messages(SimpleNamespace(create_messages=None, count_tokens=None))
    converter = AnthropicServingMessages.message_stream_converter
    events = [event async for event in converter(SimpleNamespace(), broken())]  # type: ignore[arg-type]
    assert GENERIC_ERROR in events[-1]
    assert "secret" not in "".join(events)


@pytest.mark.parametrize(
    "action,said,status",
    [
        (lambda: int("secret"), GENERIC_REFUSAL, 400),
        (lambda: {}["secret"], GENERIC_ERROR, 500),  # type: ignore[index]
        (lambda: SamplingParams(temperature=-1), "temperature", 400),
    ],
)
def test_the_messages_api_tells_no_more(action: Callable[[], Any], said: str, status: int) -> None:
    async def fail(*_: Any) -> None:
        action()

    handler = SimpleNamespace(create_messages=fail, count_tokens=fail)
    disclose_in_messages(handler)
    for method in (handler.create_messages, handler.count_tokens):
        answer = create_error_response(raised(lambda: asyncio.run(method())))  # noqa: B023
        assert said in answer.error.message
        assert "secret" not in answer.error.message
        assert answer.error.code == status
