# SPDX-License-Identifier: Apache-2.0
"""The seam in Model Runner V2 fits vLLM's class; what it does is tested on the engine (`test_equality`)."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_vtprune.kv_drop.hooks.runner_v2 import KVDropModelState


def test_overrides_take_what_vllm_passes() -> None:
    for name in ("add_request", "remove_request"):
        ours, vllms = (inspect.signature(getattr(c, name)) for c in (KVDropModelState, DefaultModelState))
        assert list(ours.parameters) == list(vllms.parameters)
    ours, vllms = (inspect.signature(c.prepare_attn) for c in (KVDropModelState, DefaultModelState))
    named = [p for p in ours.parameters if p not in ("args", "kwargs")]
    assert list(vllms.parameters)[: len(named)] == named


def test_vllm_takes_the_state_from_the_model() -> None:
    model = SimpleNamespace(get_model_state_cls=lambda: KVDropModelState)
    assert resolve_model_state_cls(None, model) is KVDropModelState  # type: ignore[arg-type]
