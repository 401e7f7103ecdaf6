# SPDX-License-Identifier: Apache-2.0
"""What lies between Ray Serve and the app of a replica, and what Serve and we answer when a replica is lost.

Imports no vLLM: Serve's proxies load this too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Said to a client whose replica or engine was lost under its request.
LOST = "The server that was answering this request is gone: send the request again."
RETRY_AFTER_SECONDS = 2


def error_document(message: str, status: int) -> dict[str, object]:
    """An error as vLLM's OpenAI routes answer it."""
    kind = HTTPStatus(status).phrase
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


async def send_error(send: Send, message: str, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    """Answer with `error_document`.

    Args:
        send: ASGI's.
        message: the sentence.
        status: HTTP's; a 429 and a 503 say when to come back, unless `headers` do.
        headers: what else to say.
    """
    body = json.dumps(error_document(message, status)).encode()
    if status in (429, 503) and all(name != b"retry-after" for name, _ in headers):
        headers = [*headers, (b"retry-after", str(RETRY_AFTER_SECONDS).encode())]
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})


class ReplicaFront:
    """The app under Serve: leaves the request id to Serve, and answers for a dead engine that it comes back.

    Serve puts the `X-Request-Id` on every answer (`ray.serve._private.http_util.RequestIdMiddleware`), beside
    the app's own. vLLM answers 500 to what was in flight when its engine died; another replica would have
    answered, so here it is a 503.

    Args:
        app: vLLM's.
        dead: whether the engine has died.
    """

    def __init__(self, app: ASGIApp, dead: Callable[[], bool]) -> None:
        self.app = app
        self.dead = dead

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        replaced = False

        async def answered(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start":
                if message["status"] == 500 and self.dead():
                    replaced = True
                    await send_error(send, LOST, 503, [])
                    return
                kept = [header for header in message["headers"] if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": kept}
            if not replaced:
                await send(message)

        await self.app(scope, receive, answered)
