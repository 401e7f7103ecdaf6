# SPDX-License-Identifier: Apache-2.0
"""Stage 2 at start-up, on vLLM's real configuration: what it installs, what it refuses, and KV groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size, is_kv_cache_spec_uniform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from tests.helpers.checkpoints import BOS, EOS, IMAGE, PAD, random_llava
from tests.helpers.kv_config import config
from vllm_vtprune.kv_drop.hooks import scheduler
from vllm_vtprune.kv_drop.hooks.cache import groups_above, split_specs
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config, recommended_prune_layer
from vllm_vtprune.kv_drop.metrics import groups_above_prune_layer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava(tmp_path_factory.mktemp("llava"), layers=6, kv_heads=2)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava(tmp_path_factory.mktemp("mistral"), layers=4, sliding_window=64)


def test_every_process_reads_the_same(checkpoint: Path) -> None:
    built = config(checkpoint, policy={"window": 5, "relevance": "last_token"}, max_num_batched_tokens=2048)
    drop = kv_drop_config(built)
    assert (drop.prune_layer, drop.window, drop.relevance) == (2, 5, "last_token")
    assert drop.special_ids == {0, BOS, EOS, PAD} and IMAGE not in drop.special_ids
    assert drop.longest_prompt == 2048 - built.scheduler_config.max_num_seqs + 1


def test_a_small_step_still_takes_half_of_itself(checkpoint: Path) -> None:
    built = config(checkpoint, max_num_batched_tokens=512, max_num_seqs=512)
    assert kv_drop_config(built).longest_prompt == 256


def test_without_a_layer_vllm_is_as_it_ships(checkpoint: Path) -> None:
    built = config(checkpoint, policy={"prune_layer": None})
    assert built.scheduler_config.scheduler_cls is None
    assert built.parallel_config.worker_cls.startswith("vllm.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"policy": {"prune_layer": 6}},
            "must be 1 to 5 for this model's 6 decoder layers, not 6; 2 is recommended",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism; set --pipeline-parallel-size 1"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "context parallelism"),
        ({"enable_lora": True}, "LoRA adapters"),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            "speculative decoding",
        ),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "KV transfer"),
        ({"scheduler_cls": "some.Scheduler"}, "a scheduler class of your own"),
        ({"worker_cls": "some.Worker"}, "a worker class of your own"),
        ({"disable_hybrid_kv_cache_manager": True}, "a single KV-cache group"),
        ({"policy": {"window": 1024}}, "a window of 1024"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    checkpoint: Path, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        config(checkpoint, **arguments)


def test_breakable_cuda_graphs_stay_off(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where vLLM would turn them on by itself, as it does for batch invariance on some models."""
    monkeypatch.setattr(VllmConfig, "_uses_breakable_cudagraph_by_default", lambda self: True)
    for policy, expected in (({}, False), ({"prune_layer": None}, True)):
        # remembers that it was unset
        monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "")
        monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH")
        config(checkpoint, policy=policy)
        assert envs.VLLM_USE_BREAKABLE_CUDAGRAPH is expected
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="breakable CUDA graphs; leave out VLLM_USE_BREAKABLE_CUDAGRAPH=1"):
        config(checkpoint)
    config(checkpoint, enforce_eager=True)


def test_another_decoder_is_refused(mistral: Path) -> None:
    with pytest.raises(ValueError, match="a mistral decoder; the supported ones are llama"):
        config(mistral)


@pytest.mark.parametrize(
    ("layers", "recommended"), [(2, 1), (6, 2), (12, 3), (24, 6), (32, 8), (40, 10), (31, 1)]
)
def test_the_recommended_layer_divides_the_depth(layers: int, recommended: int) -> None:
    assert recommended_prune_layer(layers) == recommended


@given(st.integers(2, 48).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))))
def test_vllm_keeps_the_halves_in_groups_of_their_own(depth: tuple[int, int]) -> None:
    layers, prune_layer = depth
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    specs = split_specs({f"model.layers.{i}.self_attn.attn": spec for i in range(layers)}, prune_layer)
    assert not is_kv_cache_spec_uniform(specs)
    groups = _get_kv_cache_groups_uniform_page_size(specs)
    above = groups_above([g.kv_cache_spec for g in groups])
    for i, group in enumerate(groups):
        indices = [int(name.split(".")[2]) for name in group.layer_names]
        assert all((index >= prune_layer) == (i in above) for index in indices)
    assert len(above) == groups_above_prune_layer(layers, prune_layer)


def test_layers_without_full_attention_are_refused() -> None:
    spec = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=64
    )
    with pytest.raises(ValueError, match=r"needs full-attention layers, and model.layers.0.attn has Sliding"):
        split_specs({"model.layers.0.attn": spec}, 1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_scheduler_is_the_one_vllm_would_pick(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    built = config(checkpoint)
    # the CPU platform allows one of them only
    built.scheduler_config.async_scheduling = asynchronous
    made: list[type] = []
    monkeypatch.setattr(Scheduler, "__init__", lambda self, *a, **k: made.append(type(self)))
    monkeypatch.setattr(AsyncScheduler, "__init__", lambda self, *a, **k: made.append(type(self)))
    build = built.scheduler_config.get_scheduler_cls()
    with pytest.raises(AttributeError):  # past vLLM's constructor nothing is set up
        build(vllm_config=built)
    expected = scheduler.AsyncKVDropScheduler if asynchronous else scheduler.KVDropScheduler
    assert made == [expected]
    assert issubclass(expected, AsyncScheduler) is asynchronous
