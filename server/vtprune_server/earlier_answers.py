# SPDX-License-Identifier: Apache-2.0
"""Earlier answers among a Responses request's input, in the form that vLLM reads.

`vllm.entrypoints.openai.responses.utils._construct_message_from_response_item` takes the text of an earlier
answer's first part: a refusal has none, and an answer without parts has no first, so both ended in a 500.
"""

from __future__ import annotations

from typing import Any

from openai.types.responses import ResponseOutputMessage, ResponseOutputRefusal, ResponseOutputText


def readable(request_input: str | list[Any]) -> str | list[Any]:
    """The input of a Responses request with each earlier answer beginning with a text.

    A refusal becomes the text that it says, as the chat route has it; an answer without parts says nothing.

    Args:
        request_input: `ResponsesRequest.input`; it is not changed.
    """
    if isinstance(request_input, str):
        return request_input
    return [_readable(item) if isinstance(item, ResponseOutputMessage) else item for item in request_input]


def _readable(answer: ResponseOutputMessage) -> ResponseOutputMessage:
    parts = [
        _text(part.refusal) if isinstance(part, ResponseOutputRefusal) else part for part in answer.content
    ]
    return answer.model_copy(update={"content": parts or [_text("")]})


def _text(text: str) -> ResponseOutputText:
    return ResponseOutputText(type="output_text", text=text, annotations=[])
