# SPDX-License-Identifier: Apache-2.0
"""The entry point of vLLM's `vllm.endpoint_plugins` group."""

from __future__ import annotations

import asyncio
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

    def attach_router(self, app: FastAPI) -> None:
        """Replace the prompt routes; vLLM calls this once all of its own are attached."""
        from vtprune_server.inspection import attach_inspection_routes
        from vtprune_server.playground import attach_playground
        from vtprune_server.routes import attach_prompt_routes

        attach_prompt_routes(app)
        attach_inspection_routes(app)
        attach_playground(app)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Make the shared renderer ours and load the tower, so that a bad checkpoint fails at start."""
        if engine_client is None:
            return
        from vllm_vtprune.engine_config import plugin_context
        from vllm_vtprune.vision.processor import PrunedLlavaMultiModalProcessor
        from vtprune_server.prefetch import install_prefetch
        from vtprune_server.renderer import PrunedOnlineRenderer

        context = plugin_context(engine_client.model_config)
        PrunedOnlineRenderer.install(state.online_renderer, context)
        renderer: Any = engine_client.renderer
        if isinstance(renderer.mm_processor, PrunedLlavaMultiModalProcessor):
            await asyncio.to_thread(getattr, renderer.mm_processor, "tower")
            install_prefetch(renderer, workers=min(8, context.policy.encoder_batch))


def create_plugin() -> VTPruneEndpointPlugin:
    """What the entry point names; vLLM calls it in each API process."""
    return VTPruneEndpointPlugin()
