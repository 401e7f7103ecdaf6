# SPDX-License-Identifier: Apache-2.0
"""Middleware around every route: the API key, request ids, errors that say nothing of the server's inside."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vtprune_server.sentences import FAILED

logger = logging.getLogger(__name__)

#: What anyone may read: probes, metrics, documentation, and the playground's page (which asks for the key).
PUBLIC_PATHS = frozenset(
    {
        "/health",
        "/ping",
        "/load",
        "/version",
        "/metrics",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
    }
)
PUBLIC_PREFIXES = ("/playground", "/static/", "/metrics/")


class EveryRouteAuthentication(AuthenticationMiddleware):
    """vLLM's key check for every path that is not public.

    vLLM guards paths under /v1, /v2, /inference and /cohere (`AuthenticationMiddleware`), which leaves
    /tokenize, /detokenize, /invocations and what plugins add open to anyone.
    """

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request, or answer 401."""
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            return self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        public = path in PUBLIC_PATHS or path.startswith(PUBLIC_PREFIXES)
        if public or self.verify_token(Headers(scope=scope)):
            return self.app(scope, receive, send)
        return JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)


class QuietErrors:
    """Turns an exception nobody handled into a 500 without its text.

    Without it Starlette re-raises what vLLM's catch-all handler has answered, uvicorn logs a traceback, and
    the exception's text, which may quote the request, reaches log and client.

    The log's text is withheld by `vllm_vtprune.error_text`.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noted)
        except Exception as error:
            if scope["type"] != "http":
                raise
            logger.error(
                "vtprune: error in %s %s, request id %s",
                scope["method"],
                scope["path"],
                Headers(scope=scope).get("x-request-id"),
                exc_info=error,
            )
            if started:
                return  # uvicorn closes the connection of an answer that was not finished
            body = ErrorResponse(
                error=ErrorInfo(
                    message=FAILED,
                    type="InternalServerError",
                    code=500,
                )
            )
            await JSONResponse(body.model_dump(), status_code=500)(scope, receive, send)


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
