# SPDX-License-Identifier: Apache-2.0
"""Errors nobody handled say nothing of the server's inside."""

from __future__ import annotations

import logging

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

from vtprune_server.client_errors import GENERIC_ERROR

logger = logging.getLogger(__name__)


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
                    message=GENERIC_ERROR,
                    type="InternalServerError",
                    code=500,
                )
            )
            await JSONResponse(body.model_dump(), status_code=500)(scope, receive, send)
