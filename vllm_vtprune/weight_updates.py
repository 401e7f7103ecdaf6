# SPDX-License-Identifier: Apache-2.0
"""Refuses to exchange the weights of a running engine, whose vision tower would keep the old ones.

The tower runs in the API processes, which load it once (`vision.placement`) and cache what it computed;
weights that reach the engine never reach them. A refusal comes before anything is changed.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu_worker import Worker

from vllm_vtprune.context import has_context, plugin_context
from vllm_vtprune.errors import UnsupportedConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Methods of vLLM's workers that exchange weights, or begin to.
METHODS = frozenset(
    {
        "reload_weights",
        "init_weight_transfer_engine",
        "start_weight_update",
        "start_draft_weight_update",
        "update_weights",
        "finish_weight_update",
    }
)
SENTENCE = (
    "vtprune: {what} would not reach the vision tower and its projector, which run in the API process: "
    "restart the server with the new checkpoint, or set VLLM_PLUGINS='' to run without vtprune."
)


def refuse_weight_transfer(vllm_config: VllmConfig) -> None:
    """Refuse at start what the operator opens for a trainer.

    Raises:
        UnsupportedConfigError: `--weight-transfer-config` is set.
    """
    if vllm_config.weight_transfer_config is not None:
        raise UnsupportedConfigError(SENTENCE.format(what="weight_transfer_config's weights"))


def refuse_reload_in_workers() -> None:
    """Wrap `vllm.v1.worker.gpu_worker.Worker.reload_weights`, idempotently; the CPU's worker inherits it.

    The engine answers what a worker's method raises as that call's failure, and goes on.
    """
    reload = Worker.reload_weights
    if getattr(reload, "refuses_pruned_models", False):
        return

    @functools.wraps(reload)
    def reload_weights(worker: Any, *args: Any, **kwargs: Any) -> None:
        config = worker.model_config
        if has_context(config) and plugin_context(config).prunes:
            raise UnsupportedConfigError(SENTENCE.format(what="reload_weights"))
        reload(worker, *args, **kwargs)

    reload_weights.refuses_pruned_models = True  # type: ignore[attr-defined]
    setattr(Worker, "reload_weights", reload_weights)  # noqa: B010 - mypy forbids assigning


def refuse_in_front_end(engine_client: Any) -> None:
    """Answer the routes that exchange weights with a 400: vLLM's for trainers, and `/collective_rpc`.

    Hook: `vllm.v1.engine.async_llm.AsyncLLM.collective_rpc`, through which all of them go.
    """
    call = engine_client.collective_rpc

    async def collective_rpc(method: str, *args: Any, **kwargs: Any) -> Any:
        if method in METHODS:
            raise VLLMValidationError(SENTENCE.format(what=method), parameter="method")
        return await call(method, *args, **kwargs)

    engine_client.collective_rpc = collective_rpc
