# SPDX-License-Identifier: Apache-2.0
"""A Ray Serve replica: one vLLM engine, and the app of vLLM's server with this plugin over it.

Serve calls `__serve_build_asgi_app__` after the constructor (`ray.serve.api.ingress` without an app). vLLM is
imported by the constructor, after the environment is set, as `vtprune serve` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from types import SimpleNamespace
from typing import Any

import ray
from ray import serve
from starlette.types import ASGIApp

from vtprune_server.ray_front import ReplicaFront
from vtprune_server.ray_metrics import ReplicaMetrics
from vtprune_server.serve import parse, prepare_environment

logger = logging.getLogger(__name__)

#: A dead engine is noticed within this time, in seconds.
_WATCH_SECONDS = 0.1
#: And how long the answers that say so may take to leave.
_LAST_ANSWERS_SECONDS = 1.0


class VTPruneReplica:
    """Builds the engine and the app, and leaves when the engine has died.

    Args:
        flags: the arguments of `vtprune serve`.
    """

    async def __init__(self, flags: list[str]) -> None:  # type: ignore[misc]  # Serve awaits it
        # Ray's address of this node: vLLM would look for one by the default route, which a node may lack
        os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())
        prepare_environment()
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.app import build_app

        from vllm_vtprune.compat import check_cpu_kernels, check_front_end, check_vllm_version

        check_vllm_version()
        check_front_end()
        check_cpu_kernels()
        args = parse(flags)
        if args.model_tag is not None:  # as `vllm.entrypoints.cli.serve.ServeSubcommand.cmd`
            args.model = args.model_tag
        self._exit = contextlib.AsyncExitStack()
        self._engine: Any = await self._exit.enter_async_context(build_async_engine_client(args))
        tasks = await self._engine.get_supported_tasks()
        app = build_app(args, tasks, self._engine.model_config)
        await init_app_state(self._engine, app.state, args, tasks)
        # `vllm.entrypoints.launchers.launcher.serve_http` puts its uvicorn.Server here for the error handlers
        app.state.server = SimpleNamespace(should_exit=False)
        self._state = app.state
        metrics = ReplicaMetrics(serve.get_replica_context().replica_id.to_full_id_str())
        await metrics.start(self._exit)
        metrics.attach(app)
        self._front = ReplicaFront(app, dead=self._engine_is_dead)
        self._watchdog = asyncio.create_task(self._leave_with_the_engine())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Serve sends requests to."""
        return self._front

    async def check_health(self) -> None:
        """Serve's check; raises vLLM's `EngineDeadError`."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        """Stop the engine; Serve calls it once the requests in flight are answered."""
        self._watchdog.cancel()
        await self._exit.aclose()

    def _engine_is_dead(self) -> bool:
        return bool(self._engine.errored or self._state.server.should_exit)

    async def _leave_with_the_engine(self) -> None:
        """End the process once its engine is dead.

        A replica that fails its health check stays in service for three periods; one whose process has ended
        is replaced at once. Until then no more requests are taken: they are answered 503.
        """
        while not self._engine_is_dead():
            await asyncio.sleep(_WATCH_SECONDS)
        logger.error("vtprune: the engine has died; this replica leaves and Serve starts another.")
        await asyncio.to_thread(self._state.vtprune_in_flight.drain, _LAST_ANSWERS_SECONDS)
        os._exit(1)
