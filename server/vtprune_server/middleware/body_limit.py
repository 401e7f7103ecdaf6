# SPDX-License-Identifier: Apache-2.0
"""A cap on the whole request body. vLLM has none, and reads a JSON body into memory before it looks at it."""

from __future__ import annotations

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

from vtprune_server import metrics

#: How much of a refused body is read and thrown away, so that a client still sending gets to read the answer.
_DRAIN_BYTES = 1 << 30


class BodyLimitMiddleware:
    """Answers 413 to a body larger than `max_bytes`, announced (Content-Length) or not (chunked).

    Args:
        app: the application inside.
        max_bytes: the cap.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced) > self.max_bytes:
            await _refuse(self.max_bytes, scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                metrics.REFUSED.labels("body_too_large").inc()
                # FastAPI lets an HTTPException out of the body's parsing as it is
                raise HTTPException(413, _sentence(self.max_bytes))
            return message

        await self.app(scope, counted, send)


async def _refuse(max_bytes: int, scope: Scope, receive: Receive, send: Send) -> None:
    metrics.REFUSED.labels("body_too_large").inc()
    error = ErrorInfo(message=_sentence(max_bytes), type="Request Entity Too Large", code=413)
    body = ErrorResponse(error=error).model_dump()
    drained = 0
    while drained < _DRAIN_BYTES:
        message = await receive()
        drained += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            break
    await JSONResponse(body, status_code=413, headers={"connection": "close"})(scope, receive, send)


def _sentence(max_bytes: int) -> str:
    size = f"{max_bytes / 2**20:g} MiB"
    return f"The request body is larger than {size}: send smaller or fewer images, or image URLs."
