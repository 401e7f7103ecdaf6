# SPDX-License-Identifier: Apache-2.0
"""Stage 2 at start-up, on vLLM's real configuration: what it installs, what it refuses, and KV groups."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from tests.helpers.checkpoints import BOS, EOS, IMAGE, PAD, edit_config, random_llava
from tests.helpers.kv_config import config
from vllm_vtprune.fingerprint import fingerprint
from vllm_vtprune.kv_drop.hooks import config as hook
from vllm_vtprune.kv_drop.hooks import scheduler
from vllm_vtprune.kv_drop.hooks.cache import groups_above, split_specs
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config, recommended_prune_layer
from vllm_vtprune.kv_drop.schedule import band_groups, band_sizes, parse
from vllm_vtprune.policy import PrunePolicy

#: Where vLLM makes groups of layers: a module of its own since 0.33.
_PLANNING = "vllm.v1.core.kv_cache_planning"
planning: Any = import_module(_PLANNING if find_spec(_PLANNING) else "vllm.v1.core.kv_cache_utils")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava(tmp_path_factory.mktemp("llava"), layers=6, kv_heads=2)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistral")
    return random_llava(folder, layers=4, decoder="mistral", sliding_window=64)


def test_every_process_reads_the_same(checkpoint: Path) -> None:
    built = config(checkpoint, policy={"window": 5, "relevance": "last_token"}, max_num_batched_tokens=2048)
    drop = kv_drop_config(built)
    assert (drop.prune_layers, drop.window, drop.relevance) == ((2,), 5, ("last_token",))
    assert drop.special_ids == {0, BOS, EOS, PAD} and IMAGE not in drop.special_ids
    assert drop.longest_prompt == 2048 - built.scheduler_config.max_num_seqs + 1


def test_later_turns_go_on_in_blocks_of_the_engine(checkpoint: Path) -> None:
    assert kv_drop_config(config(checkpoint, block_size=64)).reuse_block == 0
    built = config(checkpoint, policy={"kv_reuse": True}, block_size=64)
    assert kv_drop_config(built).reuse_block == 64


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
            "must be 1 to 5 for this model's 6 decoder layers, not 6; 3 is recommended",
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
        (
            {"policy": {"prune_layer": None, "prune_layers": "2:0.5,4:0", "kv_reuse": True}},
            "kv_reuse cannot be used with an exit, a share of 0, among the prune layers",
        ),
        (
            {"policy": {"kv_reuse": True}, "enable_prefix_caching": False},
            "kv_reuse cannot be used with the prefix cache off; leave out --no-enable-prefix-caching",
        ),
        ({"policy": {"kv_reuse": True}, "prefix_match_unit": 16}, "kv_reuse cannot .* a prefix match unit"),
        (
            {
                "policy": {"kv_reuse": True},
                "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
            },
            "kv_reuse cannot be used with KV-cache events",
        ),
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


def test_another_decoder_is_refused(tmp_path: Path) -> None:
    gemma = edit_config(random_llava(tmp_path, layers=4), {"text_config": {"model_type": "gemma2"}})
    with pytest.raises(ValueError, match="a gemma2 decoder; the supported ones are llama, mistral, qwen2"):
        config(gemma)


def test_a_sliding_window_is_refused(mistral: Path) -> None:
    with pytest.raises(ValueError, match="a sliding-window decoder"):
        config(mistral)


def test_a_schedule_is_written_out_for_the_model(checkpoint: Path) -> None:
    """What is compiled is filed under the configuration's text."""
    built = config(checkpoint, policy={"prune_layer": None, "prune_layers": "pyramid"})
    drop = kv_drop_config(built)
    assert drop.schedule == parse("2:vision=0.5,3:vision=0.25,4:vision=0.125")
    assert drop.relevance == ("last_token",) * 3
    assert built.additional_config["vtprune"]["prune_layers"] == "2:vision=0.5,3:vision=0.25,4:vision=0.125"
    built = config(checkpoint, policy={"prune_layer": None, "prune_layers": "exit", "relevance": "no_rope"})
    assert (kv_drop_config(built).schedule, kv_drop_config(built).relevance) == (parse("3:0"), ("no_rope",))


def test_a_calibrated_schedule_is_for_its_model(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    content = {
        "prune_layers": "2:vision=0.5,4:0",
        "relevance": ["key_norm", "inherited"],
        "layers": 6,
        "window": 5,
        "model": {"name": "llava", "weights": fingerprint(str(checkpoint))},
        "presets": {"light": 0.31, "balanced": 0.62},
    }
    path.write_text(json.dumps(content))
    policy = {"prune_layer": None, "prune_schedule": str(path)}
    built = config(checkpoint, policy=policy)
    drop = kv_drop_config(built)
    assert drop.schedule == parse("2:vision=0.5,4:0")
    assert (drop.relevance, drop.window) == (("key_norm", "inherited"), 5)
    written = PrunePolicy.from_config(built.additional_config)
    assert (written.prune_schedule, written.preset_aggressiveness) == ("", "light=0.31,balanced=0.62")
    # what the operator says is stronger
    own = {**policy, "window": 4, "relevance": "no_rope", "preset_aggressiveness": "light=0.2"}
    built = config(checkpoint, policy=own)
    drop = kv_drop_config(built)
    assert (drop.relevance, drop.window) == (("no_rope",), 4)
    assert PrunePolicy.from_config(built.additional_config).preset_aggressiveness == "light=0.2"

    other = random_llava(tmp_path / "other", layers=6, kv_heads=2, seed=5)
    with pytest.raises(ValueError, match=r"was calibrated for a model with the weights .* run `vtprune"):
        config(other, policy=policy)
    path.write_text(json.dumps({**content, "presets": {"light": 2}}))
    with pytest.raises(ValueError, match=r'prune_schedule: .*: "presets" must be an object of numbers'):
        config(checkpoint, policy=policy)
    with pytest.raises(ValueError, match="prune_schedule: aim is no JSON file"):
        config(checkpoint, policy={"prune_layer": None, "prune_schedule": "aim"})


def test_bands_that_leave_the_cache_partly_empty_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seven, told = random_llava(tmp_path, layers=7), list[str]()
    # whatever other tests did to the loggers of this process
    monkeypatch.setattr(hook.logger, "warning", lambda text, *values: told.append(text % values))
    config(seven, policy={"prune_layer": None, "prune_layers": "1,4"})
    assert told == []
    config(seven, policy={"prune_layer": None, "prune_layers": "2,5"})
    (sentence,) = told
    assert "2, 5 of 7 cut the KV cache into 4 groups of layers" in sentence


def test_a_schedule_that_does_not_fit_the_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="prune layers must be 1 to 5 for 6 decoder layers, not 6"):
        config(checkpoint, policy={"prune_layer": None, "prune_layers": "2,6"})


@pytest.mark.parametrize(
    ("layers", "recommended"), [(2, 1), (5, 3), (6, 3), (12, 3), (24, 6), (32, 8), (40, 10), (31, 8)]
)
def test_the_recommended_layer_is_near_a_quarter_and_not_too_early(layers: int, recommended: int) -> None:
    assert recommended_prune_layer(layers) == recommended


@st.composite
def decoders(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Depth, and one to four prune layers."""
    layers = draw(st.integers(2, 48))
    return layers, sorted(draw(st.sets(st.integers(1, layers - 1), min_size=1, max_size=4)))


@given(decoders())
def test_vllm_keeps_the_bands_in_groups_of_their_own(decoder: tuple[int, list[int]]) -> None:
    layers, prune_layers = decoder
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
    specs = split_specs({f"model.layers.{i}.self_attn.attn": spec for i in range(layers)}, *prune_layers)
    assert not planning.is_kv_cache_spec_uniform(specs)
    groups = planning._get_kv_cache_groups_uniform_page_size(specs)
    below = dict(groups_above([g.kv_cache_spec for g in groups]))
    bands = []
    for i, group in enumerate(groups):
        indices = [int(name.split(".")[2]) for name in group.layer_names]
        (band,) = {sum(index >= layer for layer in prune_layers) for index in indices}
        assert below.get(i, -1) == band - 1
        bands.append(band)
    counts, empty = band_groups(band_sizes(layers, prune_layers))
    assert [bands.count(band) for band in range(len(prune_layers) + 1)] == counts
    largest = max(len(group.layer_names) for group in groups)
    assert empty == pytest.approx(len(groups) * largest / layers - 1)


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
