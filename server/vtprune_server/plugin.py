# SPDX-License-Identifier: Apache-2.0
"""The entry point of vLLM's `vllm.endpoint_plugins` group."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import Namespace

    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient


class VTPruneEndpointPlugin:
    """`vllm.plugins.endpoint_plugins.interface.EndpointPlugin`: our routes over vLLM's."""

    name = "vtprune"
    required_tasks = ("generate",)
    _app: FastAPI | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Replace the prompt routes and add ours; vLLM calls this once all of its own are attached.

        Middleware added here runs inside vLLM's (CORS, its key check), the last added outermost; what goes
        around vLLM's is added by `init_state`.
        """
        from vllm import envs

        from vtprune_server import media  # noqa: F401  (registers the media connector)
        from vtprune_server.health import attach_health
        from vtprune_server.inspection import attach_inspection_routes
        from vtprune_server.limits import ServerLimits
        from vtprune_server.log_level import keep_warnings
        from vtprune_server.middleware.auth import EveryRouteAuthentication
        from vtprune_server.middleware.body_limit import BodyLimitMiddleware
        from vtprune_server.middleware.drain import DrainMiddleware, RequestsInFlight
        from vtprune_server.middleware.quiet_errors import QuietErrors
        from vtprune_server.playground import attach_playground
        from vtprune_server.request_log import configure_request_log
        from vtprune_server.routes import attach_prompt_routes

        args, limits = app.state.args, ServerLimits.from_environ(os.environ)
        keep_warnings()
        attach_prompt_routes(app)
        attach_health(app)
        attach_inspection_routes(app)
        attach_playground(app)
        configure_request_log(limits.log_requests)
        app.add_middleware(QuietErrors)
        if limits.max_body_mb:
            app.add_middleware(BodyLimitMiddleware, max_bytes=limits.max_body_mb * 2**20)
        app.state.vtprune_in_flight = RequestsInFlight()
        app.add_middleware(DrainMiddleware, in_flight=app.state.vtprune_in_flight)
        # the same keys as vLLM's `init_entrypoints_middleware`
        keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        if keys:
            app.add_middleware(EveryRouteAuthentication, tokens=keys)
        self._app = app

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Make the shared renderer ours and load the tower, so that a bad checkpoint fails at start."""
        if self._app is not None:
            add_outer_middleware(self._app)
        if engine_client is None:
            return
        from vllm_vtprune.context import plugin_context
        from vllm_vtprune.error_text import withhold_everywhere
        from vllm_vtprune.vision.gpu_budget import restore_video_pool
        from vllm_vtprune.vision.processor import PrunedProcessor
        from vllm_vtprune.vision.shared.client import SharedTower
        from vllm_vtprune.weight_updates import refuse_in_front_end
        from vtprune_server.client_errors import disclose_in_messages, disclose_in_streams
        from vtprune_server.engine_load import auto_level, follow, listen
        from vtprune_server.gate import install_gate_reports
        from vtprune_server.grammar import install_grammar_errors
        from vtprune_server.health import TowerHealth
        from vtprune_server.kv_plan import KVPlanner
        from vtprune_server.metrics import count_waiting_images, observe_tower_pass
        from vtprune_server.middleware.drain import drain_before_shutdown
        from vtprune_server.model_presets import add_preset_models
        from vtprune_server.prefetch import install_prefetch
        from vtprune_server.renderer import PrunedOnlineRenderer
        from vtprune_server.resend import install_resend

        if not args.log_error_stack:
            withhold_everywhere()
        drain_before_shutdown(engine_client, state.vtprune_in_flight)
        context = plugin_context(engine_client.model_config)
        if context.video_gpu_gb is not None:
            config = engine_client.vllm_config
            restore_video_pool(config.model_config, config.parallel_config, context.video_gpu_gb)
        kv_planner = None
        if context.policy.prune_layer is not None:
            kv_planner = KVPlanner.of(engine_client.vllm_config)
        disclose_in_streams(state._state.values())
        if state.anthropic_serving_messages is not None:
            disclose_in_messages(state.anthropic_serving_messages)
        model_presets = add_preset_models(state.openai_serving_models, context.policy)
        auto = state.vtprune_auto = auto_level(context.policy)
        # kept: the loop holds tasks weakly
        load = listen(engine_client, max(1, getattr(args, "api_server_count", None) or 1))
        state.vtprune_auto_task = asyncio.create_task(follow(auto, load))
        PrunedOnlineRenderer.install(state.online_renderer, context, kv_planner, model_presets, auto)
        renderer: Any = engine_client.renderer
        if isinstance(renderer.mm_processor, PrunedProcessor):
            await asyncio.to_thread(renderer.mm_processor.warm_up)
            tower = renderer.mm_processor.vision
            tower.observer, tower.waiting_observer = observe_tower_pass, count_waiting_images
            if isinstance(tower, SharedTower) and self._app is not None:
                self._app.state.vtprune_tower_health = TowerHealth(tower)
            install_prefetch(renderer, workers=min(8, context.policy.encoder_batch))
            install_resend(engine_client)
        if context.policy.prune_gate:
            install_gate_reports(engine_client)
        install_grammar_errors(engine_client)
        if context.prunes:
            refuse_in_front_end(engine_client)


def add_outer_middleware(app: FastAPI) -> None:
    """Add what goes around vLLM's middleware, once `build_app` has built the stack and before it runs.

    Hook: `starlette.applications.Starlette.middleware_stack`, which takes no more by then.
    """
    from vtprune_server.middleware.anthropic_errors import AnthropicErrors
    from vtprune_server.middleware.request_ids import RequestIds
    from vtprune_server.middleware.request_log import RequestLog

    stack = AnthropicErrors(app.middleware_stack or app.build_middleware_stack())
    answer = not app.state.args.enable_request_id_headers
    app.middleware_stack = RequestIds(RequestLog(stack), answer=answer)


def create_plugin() -> VTPruneEndpointPlugin:
    """What the entry point names; vLLM calls it in each API process."""
    return VTPruneEndpointPlugin()
