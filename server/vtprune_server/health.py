# SPDX-License-Identifier: Apache-2.0
"""`/health` with a shared vision tower: vLLM's own answer, and whether the tower's process is there."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute

from vllm_vtprune.errors import TowerLostError
from vllm_vtprune.vision.shared.client import SharedTower

logger = logging.getLogger(__name__)


class TowerHealth:
    """Tells of a shared tower, and has it started again where it has died.

    Args:
        tower: this API process's access to it.
    """

    def __init__(self, tower: SharedTower) -> None:
        self._tower = tower
        self._reviving = threading.Lock()

    async def answer(self) -> Response:
        """200 with the number of restarts, or 503 while the process is started again."""
        found = await asyncio.to_thread(self._tower.state)
        alive = found["pid"] is not None
        if not alive and self._reviving.acquire(blocking=False):
            threading.Thread(target=self._revive, daemon=True).start()
        state = {"state": "running" if alive else "restarting", **found}
        return JSONResponse({"tower": state}, status_code=200 if alive else 503)

    def _revive(self) -> None:
        try:
            self._tower.revive()
        except (OSError, TowerLostError) as error:
            logger.error("vtprune: %s", error)  # the next to ask tries again
        finally:
            self._reviving.release()


def attach_health(app: FastAPI) -> None:
    """Add our version of vLLM's route, which is the same until `app.state.vtprune_tower_health` is set."""
    for route in list(app.routes):
        if isinstance(route, APIRoute) and route.path == "/health" and "GET" in (route.methods or ()):
            app.add_api_route(
                "/health",
                _with_tower(route.endpoint),
                methods=["GET"],
                response_class=Response,
                summary=route.summary,
                name=route.name,
            )


def _with_tower(vllms: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Any]:
    async def health(raw_request: Request) -> Response:
        """Health check."""
        response = await vllms(raw_request)
        tower: TowerHealth | None = getattr(raw_request.app.state, "vtprune_tower_health", None)
        return response if tower is None or response.status_code != 200 else await tower.answer()

    return health
