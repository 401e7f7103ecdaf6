# SPDX-License-Identifier: Apache-2.0
"""Earlier answers of a Responses request reach vLLM's own reader of them with a text."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.utils import construct_input_messages

from vtprune_server.earlier_answers import readable

TEXT = {"type": "output_text", "text": "red", "annotations": []}
REFUSAL = {"type": "refusal", "refusal": "no"}


def answered(*content: dict[str, Any]) -> ResponsesRequest:
    """A request whose input is an answer of these parts and a question."""
    answer = {
        "type": "message",
        "id": "m",
        "role": "assistant",
        "status": "completed",
        "content": list(content),
    }
    return ResponsesRequest(model="m", input=[answer, {"role": "user", "content": "why ?"}])


@pytest.mark.parametrize(
    "content,said", [((REFUSAL,), "no"), ((), ""), ((TEXT,), "red"), ((REFUSAL, TEXT), "no")]
)
def test_an_earlier_answer_is_read(content: tuple[dict[str, Any], ...], said: str) -> None:
    request = answered(*content)
    before = request.model_dump_json()
    messages = construct_input_messages(request_input=readable(request.input))
    assert [dict(message) for message in messages] == [
        {"role": "assistant", "content": said},
        {"role": "user", "content": "why ?"},
    ]
    assert request.model_dump_json() == before


def test_a_text_stays_itself() -> None:
    assert readable("why ?") == "why ?"
