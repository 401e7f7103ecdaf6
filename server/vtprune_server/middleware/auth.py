# SPDX-License-Identifier: Apache-2.0
"""The API key, asked for on every route that is not public."""

from __future__ import annotations

from collections.abc import Awaitable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

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
