# SPDX-License-Identifier: Apache-2.0
"""A log line for requests that never reach a handler: no key, a bad header, a body that does not parse."""

from __future__ import annotations

import time

from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vtprune_server.request_log import FOLLOWED, Followed, log_unfollowed


class RequestLog:
    """Logs each refused request that no `request_log.LoggedRequest` has followed.

    It goes around vLLM's key check, inside `RequestIds`. Requests that were answered and have no record are
    probes, scrapes and pages, and are passed over.

    Args:
        app: the application inside.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        followed = scope[FOLLOWED] = Followed()
        started, status = time.perf_counter(), None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            if not followed.by_record and (status is None or status >= 400):
                log_unfollowed(scope, _route(scope), status, time.perf_counter() - started)


def _route(scope: Scope) -> str | None:
    """The route's own path; None where there is none, since a path is the client's text."""
    routes = scope["app"].routes
    found = next((route for route in routes if route.matches(scope)[0] is not Match.NONE), None)
    return getattr(found, "path", None)
