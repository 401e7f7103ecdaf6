# SPDX-License-Identifier: Apache-2.0
"""The seam in Model Runner V2, on the real classes as far as they go without an accelerator."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_vtprune.kv_drop.bands import KVDropBands
from vllm_vtprune.kv_drop.hooks import worker
from vllm_vtprune.kv_drop.hooks.cache import split_specs
from vllm_vtprune.kv_drop.hooks.runner_v2 import KVDropModelState
from vllm_vtprune.kv_drop.plan import KVDropConfig
from vllm_vtprune.kv_drop.relevance import kept_rows
from vllm_vtprune.kv_drop.schedule import PruneLayer
from vllm_vtprune.settings import KVSettings

BLOCK = 4
CPU = torch.device("cpu")


@pytest.fixture
def model_state(monkeypatch: pytest.MonkeyPatch) -> KVDropModelState:
    """Built past the constructor, which wants an accelerator; vLLM's `prepare_attn` returns its arguments."""
    state = object.__new__(KVDropModelState)
    state.model = SimpleNamespace(kv_drop=KVDropBands(1, 8, 400, CPU))  # type: ignore[assignment]
    state.rope_state = state.prompt_embeds_state = None
    state._config = KVDropConfig((PruneLayer(1),), window=2, longest_prompt=300)
    state._drops, state._preempted, state._leaving = {}, {}, frozenset()
    real = inspect.signature(DefaultModelState.prepare_attn)

    def prepare_attn(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(real.bind(self, *args, **kwargs).arguments)

    monkeypatch.setattr(DefaultModelState, "prepare_attn", prepare_attn)
    return state


def new_request(request_id: str, tokens: int, keep: float) -> NewRequestData:
    image = MultiModalFeatureSpec(
        data=None, modality="image", identifier="x", mm_position=PlaceholderRange(offset=1, length=5)
    )
    return NewRequestData(
        req_id=request_id,
        prompt_token_ids=list(range(10, 10 + tokens)),
        mm_features=[image],
        sampling_params=SamplingParams(extra_args=KVSettings(keep).extra_args()),
        pooling_params=None,
        block_ids=([], []),
        num_computed_tokens=0,
        lora_request=None,
    )


def input_batch(req_ids: list[str], scheduled: list[int], computed: list[int]) -> InputBatch:
    """The runner's own dummy batch, with other requests in it."""
    batch = InputBatch.make_dummy(len(req_ids), sum(scheduled), InputBuffers(8, 400, CPU))
    batch.req_ids = req_ids
    batch.num_scheduled_tokens = np.array(scheduled, dtype=np.int32)
    batch.num_computed_tokens_np = np.array(computed, dtype=np.int32)
    return batch


def cache_config() -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    specs = split_specs({f"model.layers.{i}.attn": spec for i in range(2)}, 1)
    groups = [KVCacheGroupSpec([name], spec) for name, spec in specs.items()]
    return KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=groups)


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


def test_a_step_writes_compacted_slots_above_the_prune_layer_only(model_state: KVDropModelState) -> None:
    model_state.add_request(0, new_request("whole", 12, 1.0))
    model_state.add_request(1, new_request("pruned", 12, 0.5))
    tables = tuple(torch.arange(16, dtype=torch.int32).view(2, 8) + 1 + 16 * g for g in range(2))

    def step(scheduled: list[int], computed: list[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        slots = torch.full((2, 40), 7, dtype=torch.int64)
        batch = input_batch(["whole", "pruned"], scheduled, computed)
        passed = model_state.prepare_attn(
            batch, CUDAGraphMode.NONE, tables, slots, [], cache_config(), for_capture=False
        )
        assert passed["input_batch"] is batch and passed["for_capture"] is False
        return slots, passed

    slots, _ = step([12, 12], [0, 0])
    prompts = model_state.model.kv_drop.bands[0].prompts
    assert prompts is not None and (prompts.rows, prompts.rows_kept) == (24, 18)
    above = [4 * (17 + p // 4) + p % 4 for p in range(12)] + [4 * (25 + p // 4) + p % 4 for p in range(6)]
    assert slots[1].tolist() == above + [-1] * 22
    assert slots[0].tolist() == [7] * 40  # below, vLLM's own mapping stands
    rows = kept_rows(
        torch.randn(24, 2, 8), torch.randn(24, 2, 8), prompts, queries=2, total_heads=2, scale=1.0
    )
    assert rows[:12].tolist() == list(range(12)) and {12, 22, 23} <= set(rows[12:].tolist())

    slots, _ = step([1, 1], [12, 12])
    assert model_state.model.kv_drop.bands[0].prompts is None
    # the whole request's 13th token, and the pruned one's 7th
    assert slots[1, :2].tolist() == [4 * 20, 4 * 26 + 2]


def test_dummy_and_removed_requests_lose_nothing(model_state: KVDropModelState) -> None:
    model_state.add_request(0, new_request("pruned", 12, 0.5))
    tables = tuple(torch.ones(2, 8, dtype=torch.int32) for _ in range(2))
    for before in (lambda: None, lambda: model_state.remove_request("pruned")):
        before()
        slots = torch.full((2, 40), 7, dtype=torch.int64)
        batch = input_batch(["req_0_dummy"], [12], [0])
        model_state.prepare_attn(batch, CUDAGraphMode.FULL, tables, slots, [], cache_config(), True)
        assert (slots == 7).all() and model_state.model.kv_drop.bands[0].step is None
    batch = input_batch(["pruned"], [12], [0])
    model_state.prepare_attn(batch, CUDAGraphMode.NONE, tables, slots, [], cache_config())
    assert model_state.model.kv_drop.bands[0].step is None


def test_a_preempted_request_loses_the_same_tokens_when_it_resumes(model_state: KVDropModelState) -> None:
    def remembered() -> Any:
        drop = model_state._drops["pruned"]
        return None if drop is None else drop[0].kept

    def resume() -> None:
        model_state.add_request(0, new_request("pruned", 12, 0.5))

    resume()
    drops = model_state._drops["pruned"]
    assert drops is not None
    (drop,) = drops
    drop.kept = torch.arange(6), 0

    model_state.expect(finished=["other"], preempted=["pruned"])
    model_state.remove_request("pruned")
    model_state.expect(finished=[], preempted=[])
    resume()
    assert remembered() is drop.kept

    # preempted again, and aborted while it waited: a later request of that name is another one
    model_state.expect(finished=[], preempted=["pruned"])
    model_state.remove_request("pruned")
    model_state.expect(finished=["pruned"], preempted=[])
    resume()
    assert remembered() is None
    assert not model_state._preempted

    model_state.remove_request("pruned")
    assert not model_state._preempted, "finished, not preempted"


def test_the_worker_says_who_leaves_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(worker._Worker, "execute_model", lambda self, output: said.append("step") or "done")
    mine = object.__new__(worker.KVDropWorker)
    mine.use_v2_model_runner = True
    state = SimpleNamespace(expect=lambda *ids: said.append(ids))
    mine.model_runner = SimpleNamespace(model_state=state)
    output = SchedulerOutput.make_empty()
    output.finished_req_ids = {"a"}
    assert mine.execute_model(output) == "done"
    output.preempted_req_ids = {"b"}
    mine.execute_model(output)
    assert said == [({"a"}, ()), "step", ({"a"}, {"b"}), "step"]
