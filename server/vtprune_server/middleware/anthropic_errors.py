# SPDX-License-Identifier: Apache-2.0
"""Errors in Anthropic's shape on Anthropic's routes, whoever answers them.

What vLLM's messages handler raises has that shape already
(`vllm.entrypoints.anthropic.api_router.translate_error_response`); a bad header, a body that does not parse,
a missing key, a body too large and a server on its way down are answered outside it.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ROUTES = "/v1/messages"
#: Of an error that comes without a type of its own (https://docs.anthropic.com/en/api/errors).
_TYPES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large"}


class AnthropicErrors:
    """Rewrites the JSON of an error on `/v1/messages` and below.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or not (path == _ROUTES or path.startswith(f"{_ROUTES}/")):
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def translated(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    content = _translate(body, start["status"])
                    MutableHeaders(raw=start["headers"])["content-length"] = str(len(content))
                    await send(start)
                    await send({"type": "http.response.body", "body": content})

        await self.app(scope, receive, translated)


def _translate(body: bytes, status: int) -> bytes:
    try:
        answer = json.loads(body)
    except ValueError:
        return body
    error = answer.get("error") if isinstance(answer, dict) else None
    if error is None or answer.get("type") == "error":
        return body
    told: dict[str, Any] = error if isinstance(error, dict) else {"message": error}
    kind = told.get("type") or _TYPES.get(status, HTTPStatus(status).phrase)
    return json.dumps({"type": "error", "error": {"type": kind, "message": told.get("message", "")}}).encode()
