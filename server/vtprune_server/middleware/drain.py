# SPDX-License-Identifier: Apache-2.0
"""Graceful shutdown: requests in flight finish, new ones are sent elsewhere.

On SIGTERM vLLM calls `EngineClient.shutdown(timeout)` in each API process
(`vllm.entrypoints.launchers.launcher.serve_http`). With one API process that drains the engine; with several
it cuts the process off from an engine that others still use, and open streams break. So here the shutdown
waits, up to the same timeout (``--shutdown-timeout``), until the process has answered what it has accepted.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

#: Answered to the last, so that a last scrape sees the final counts.
_ALWAYS = ("/metrics",)


class RequestsInFlight:
    """How many requests a process is answering, and whether it takes more. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self.draining = False

    def begin(self) -> bool:
        """Count a request in; False where no more are taken."""
        with self._changed:
            self._count += not self.draining
            return not self.draining

    def end(self) -> None:
        """Count a request out."""
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Take no more requests and wait for those there are; False where some are left after `timeout` s."""
        with self._changed:
            self.draining = True
            return self._changed.wait_for(lambda: self._count == 0, timeout)


class DrainMiddleware:
    """Counts requests, and answers 503 once the server is on its way down.

    Args:
        app: the application inside.
        in_flight: shared with `drain_before_shutdown`.
    """

    def __init__(self, app: ASGIApp, in_flight: RequestsInFlight) -> None:
        self.app = app
        self.in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"].startswith(_ALWAYS):
            await self.app(scope, receive, send)
            return
        if not self.in_flight.begin():
            error = ErrorInfo(
                message="The server is shutting down: send the request to another one, or again in a moment.",
                type="Service Unavailable",
                code=503,
            )
            headers = {"connection": "close", "retry-after": "5"}
            body = ErrorResponse(error=error).model_dump()
            await JSONResponse(body, status_code=503, headers=headers)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            self.in_flight.end()


def drain_before_shutdown(engine_client: Any, in_flight: RequestsInFlight) -> None:
    """Have this engine client's `shutdown` wait for the requests in flight first."""
    shutdown = engine_client.shutdown

    def drained_shutdown(timeout: float | None = None) -> None:
        started = time.monotonic()
        in_flight.drain(timeout or 0)
        left = None if timeout is None else max(0, timeout - (time.monotonic() - started))
        shutdown(timeout=left)

    engine_client.shutdown = drained_shutdown
