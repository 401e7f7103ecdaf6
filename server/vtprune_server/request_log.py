# SPDX-License-Identifier: Apache-2.0
"""The end of a request: counted and logged.

The log has one JSON line for every request that renders a prompt and every one that is refused: its id,
settings, counts and outcome, and nothing of what it said or showed. The lines go to the logger
``vtprune.requests``, by default to standard error; a logging configuration (`VLLM_LOGGING_CONFIG_PATH`) that
names this logger takes over.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from vtprune_server import metrics
from vtprune_server.scale_out import RENDER_ROUTES

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Scope

    from vtprune_server.context import RequestContext
    from vtprune_server.counts import TokenCounts

logger = logging.getLogger("vtprune.requests")

#: Routes that render a prompt and generate nothing: their counts are reported, not served.
_COUNTING_ROUTES = ("/tokenize", "/v1/messages/count_tokens", *RENDER_ROUTES)
#: Key of an ASGI scope: the request's `Followed`.
FOLLOWED = "vtprune.followed"
#: How much of a client's own request id is logged.
_LONGEST_ID = 128


@dataclass
class Followed:
    """Whether a `LoggedRequest` logs the request; else `middleware.request_log` does, if it is refused."""

    by_record: bool = False


def configure_request_log(enabled: bool) -> None:
    """Send the lines to standard error, unless the operator has configured the logger."""
    logger.disabled = not enabled
    if not logger.handlers:
        # the original stream: vLLM puts a prefix before every line of sys.stderr
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class LoggedRequest:
    """Follows one request to its end, then counts and logs it.

    Args:
        context: filled while the request is served.
        raw_request: for route and request id.
    """

    def __init__(self, context: RequestContext, raw_request: Request | None) -> None:
        self._context = context
        self._raw_request = raw_request
        self._started = time.perf_counter()
        followed = raw_request.scope.get(FOLLOWED) if raw_request is not None else None
        if followed is not None:
            followed.by_record = True

    @property
    def undecided(self) -> bool:
        """Whether a gate is still to decide on one of the prompts."""
        return any(plan.gate is not None for plan in self._context.plans)

    def count(self, counts: TokenCounts) -> None:
        """An answer that carries these counts is about to be sent, or was."""
        if self._route in _COUNTING_ROUTES:
            return
        settings = self._context.settings
        preset, level = ("off", None) if settings is None else (settings.preset, settings.level)
        metrics.count_response(preset, level, counts)
        kv_planner = self._context.kv_planner
        if kv_planner is not None:
            for plan in self._context.plans:
                kv_planner.count(plan)
        reason = self._unpruned_because(counts)
        if reason is not None:
            metrics.UNPRUNED.labels(reason).inc()

    def answered(self, status: int | None, **extra: Any) -> None:
        """The answer is complete; no status means that the client went away before it."""
        self._log(status=status, **extra)

    def failed(self, error: BaseException) -> None:
        """The handler raised; logged is the status vLLM's exception handlers make of it, and its type."""
        cut = isinstance(error, asyncio.CancelledError)
        status = create_error_response(error).error.code if isinstance(error, Exception) else None
        self._log(status=status, **({"cut": True} if cut else {"error": type(error).__name__}))

    @property
    def _route(self) -> str:
        return self._raw_request.url.path if self._raw_request is not None else ""

    def _unpruned_because(self, counts: TokenCounts) -> str | None:
        """Why no token was dropped; None when some were."""
        settings = self._context.settings
        if counts.drops:
            return None
        if self._context.unpruned is not None:
            return self._context.unpruned
        if settings is None or (settings.vision.keeps_all and not settings.kv.drops):
            return "off"
        return "nothing_to_drop" if counts.vision_tokens else "no_images"

    def _log(self, **fields: Any) -> None:
        if logger.disabled:
            return
        context = self._context
        if context.settings is not None:
            fields["settings"] = {k: v for k, v in context.settings.as_dict().items() if v is not None}
        if context.counts is not None:
            fields |= context.counts.as_usage()
        if context.unpruned is not None:
            fields["unpruned"] = context.unpruned
        _write(self._request_id(), self._route, time.perf_counter() - self._started, fields)

    def _request_id(self) -> str | None:
        if self._raw_request is None:
            return None
        # set by vLLM's handlers (`RequestResponseMetadata`); the header by `middleware.request_ids`
        metadata = getattr(self._raw_request.state, "request_metadata", None)
        request_id = getattr(metadata, "request_id", None) or self._raw_request.headers.get("x-request-id")
        return request_id[:_LONGEST_ID] if request_id else None


def log_unfollowed(scope: Scope, route: str | None, status: int | None, seconds: float) -> None:
    """Log a request that no record follows; no status means that the client went away before an answer."""
    request_id = Headers(scope=scope).get("x-request-id")
    _write(request_id and request_id[:_LONGEST_ID], route, seconds, {"status": status})


def _write(request_id: str | None, route: str | None, seconds: float, fields: dict[str, Any]) -> None:
    line = {
        "event": "request",
        "request_id": request_id,
        "route": route,
        "seconds": round(seconds, 4),
        **fields,
    }
    logger.info(json.dumps(line, separators=(",", ":")))
