# SPDX-License-Identifier: Apache-2.0
"""One id for the response, the log line and the engine's request."""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: A client's own id is used up to this length; it goes into every answer and log line.
_LONGEST_ID = 128


class RequestIds:
    """Gives a request without a usable `X-Request-Id` one, and returns it.

    vLLM makes its own id from this header where it is there, so response, log line and engine share one.

    Args:
        app: the application inside.
        answer: whether to put the id on the response; vLLM's own --enable-request-id-headers does it too.
    """

    def __init__(self, app: ASGIApp, answer: bool = True) -> None:
        self.app = app
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id")
        if request_id is None or len(request_id) > _LONGEST_ID:
            request_id = uuid.uuid4().hex
            # in place: vLLM's middleware further out reads the same list
            kept = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
            scope["headers"][:] = [*kept, (b"x-request-id", request_id.encode())]

        async def answered(message: Message) -> None:
            if self.answer and message["type"] == "http.response.start":
                MutableHeaders(raw=message["headers"]).setdefault("X-Request-Id", request_id)
            await send(message)

        await self.app(scope, receive, answered)
