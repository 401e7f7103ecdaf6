# SPDX-License-Identifier: Apache-2.0
"""The weights of a running engine are not exchanged behind the tower's back; nothing has changed by then."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from tests.conftest import DEMO_MODEL
from tests.helpers.kv_config import config
from vllm_vtprune.context import PluginContext, attach_context
from vllm_vtprune.plugin import register_with_vllm
from vllm_vtprune.weight_updates import METHODS, refuse_in_front_end


def test_a_trainers_configuration_is_refused_at_start() -> None:
    with pytest.raises(ValueError, match="would not reach the vision tower and its projector"):
        config(DEMO_MODEL, weight_transfer_config=WeightTransferConfig(backend="nccl"))


class Runner:
    def __init__(self) -> None:
        self.reloaded: list[Any] = []

    def reload_weights(self, **kwargs: Any) -> None:
        self.reloaded.append(kwargs)


def _worker(context: PluginContext | None) -> Any:
    built = config(DEMO_MODEL)
    if context is None:
        del built.model_config.vtprune_context  # type: ignore[attr-defined]
    else:
        attach_context(built.model_config, context)
    return SimpleNamespace(model_config=built.model_config, vllm_config=built, model_runner=Runner())


def test_a_worker_reloads_what_the_plugin_does_not_prune_and_nothing_else() -> None:
    register_with_vllm()
    register_with_vllm()
    assert CPUWorker.reload_weights is Worker.reload_weights
    pruned = _worker(PluginContext())
    with pytest.raises(ValueError, match="reload_weights would not reach the vision tower"):
        Worker.reload_weights(pruned, weights_path="elsewhere")
    assert pruned.model_runner.reloaded == []
    for other in (_worker(PluginContext(prunes=False)), _worker(None)):
        Worker.reload_weights(other, weights_path="elsewhere")
        assert other.model_runner.reloaded == [{"weights_path": "elsewhere"}]


async def test_the_routes_for_trainers_are_refused_before_the_engine_hears_of_them() -> None:
    heard: list[str] = []

    class Client:
        async def collective_rpc(self, method: str, **kwargs: Any) -> str:
            heard.append(method)
            return "done"

    client: Any = Client()
    refuse_in_front_end(client)
    update = WeightTransferUpdateRequest(update_info={})
    for call in (
        AsyncLLM.init_weight_transfer_engine(client, WeightTransferInitRequest(init_info={})),
        AsyncLLM.start_weight_update(client),
        AsyncLLM.start_draft_weight_update(client),
        AsyncLLM.update_weights(client, update),
        AsyncLLM.finish_weight_update(client),
        client.collective_rpc("reload_weights", kwargs={"weights_path": "elsewhere"}),
    ):
        with pytest.raises(VLLMValidationError, match="restart the server with the new checkpoint"):
            await call
    assert heard == []
    assert await client.collective_rpc("profile") == "done" and heard == ["profile"]


def test_every_method_is_one_of_vllms_workers() -> None:
    assert all(hasattr(Worker, method) for method in METHODS)
