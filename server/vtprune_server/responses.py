# SPDX-License-Identifier: Apache-2.0
"""Adds the token counts to vLLM's responses: headers, `usage.vtprune` in a body, and in a stream's usage."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse

from vllm_vtprune.contract import LEVEL_HEADER
from vtprune_server.counts import TokenCounts
from vtprune_server.request_log import LoggedRequest


def annotate(
    response: Any, counts: TokenCounts | None, record: LoggedRequest, level: str | None = None
) -> Any:
    """Put the counts on a response of one of vLLM's handlers, and record it.

    Args:
        response: what the handler returned; None when the client went away.
        counts: None when no prompt was rendered (an error, or a route without one).
        record: told when the answer is complete, for a stream when its last event was sent.
        level: the preset that `auto` was; None where it was not asked for.

    Returns:
        The response to send. Errors (status 400 and above) are passed on untouched.
    """
    if type(response) is Response and not response.body:
        response = None  # 0.33's `with_cancellation` answers so for a client that went away, 0.32's with None
    status = getattr(response, "status_code", None)
    if counts is None or not isinstance(response, Response) or response.status_code >= 400:
        record.answered(status)
        return response
    # what a gate decides on a stream's prompt is known with its last output
    late = isinstance(response, StreamingResponse) and record.undecided
    if not late:
        record.count(counts)
    if isinstance(response, StreamingResponse):
        response.body_iterator = _annotated_events(response.body_iterator, counts, record, late=late)
    elif isinstance(response, JSONResponse):
        body = json.loads(bytes(response.body))
        if _add_to_usage(body, counts) or _add_to_token_count(body, counts):
            response.body = response.render(body)
            response.headers["content-length"] = str(len(response.body))
    if not isinstance(response, StreamingResponse):
        record.answered(status)
    response.headers.update(counts.as_headers())
    if level is not None:
        response.headers[LEVEL_HEADER] = level
    return response


async def _annotated_events(
    events: AsyncIterable[Any], counts: TokenCounts, record: LoggedRequest, *, late: bool
) -> AsyncIterator[Any]:
    outcome = "cut"
    try:
        async for event in events:
            yield _annotated_event(event, counts)
        outcome = "done"
    finally:
        if late:
            record.count(counts)
        record.answered(200, stream=outcome)
        # a client that goes away must reach vLLM's generator, which then aborts the request
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()


def _annotated_event(event: str | bytes | memoryview, counts: TokenCounts) -> str | bytes | memoryview:
    """Rewrite the `data:` lines of one server-sent event that carry a usage object."""
    if not isinstance(event, str) or '"usage"' not in event:
        return event
    lines = event.split("\n")
    for i, line in enumerate(lines):
        if not line.startswith("data: {"):
            continue
        data = json.loads(line.removeprefix("data: "))
        if _add_to_usage(data, counts):
            lines[i] = "data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return "\n".join(lines)


def _add_to_usage(data: Any, counts: TokenCounts) -> bool:
    """Add to `usage`, wherever the API keeps it: at the top, or in `response` or `message` of an event."""
    found = False
    for holder in (
        (data, *(data.get(key) for key in ("response", "message"))) if isinstance(data, dict) else ()
    ):
        if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
            holder["usage"]["vtprune"] = counts.as_usage()
            found = True
    return found


def _add_to_token_count(body: Any, counts: TokenCounts) -> bool:
    """`/tokenize` and `/v1/messages/count_tokens` count without generating and have no usage object."""
    if isinstance(body, dict) and ("max_model_len" in body or "input_tokens" in body):
        body["vtprune"] = counts.as_usage()
        return True
    return False
