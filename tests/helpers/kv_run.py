# SPDX-License-Identifier: Apache-2.0
"""Drives a real engine through one scenario of stage 2 and saves what it saw.

    python -m tests.helpers.kv_run SCENARIO CHECKPOINT OUT

The engine core runs in this process, so that its block pool can be looked at, and each scenario has a process
of its own, since a plugin cannot be unloaded.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.helpers.kv_cases import (
    BANDS,
    QUESTION,
    TURNS,
    TURNS_BLOCK,
    alone,
    band_cases,
    band_crowd,
    corners,
    crowd,
    gate_cases,
    gate_crowd,
    grid,
    texts,
    ungated,
    unpruned,
)
from tests.helpers.kv_engine import Engine, answer, refusal
from tests.helpers.kv_events import (
    capacity,
    dummy_runs_between,
    events,
    graphs,
    piecewise_graphs,
    preempted_and_aborted,
    reset_then_abort,
    reset_while_running,
)
from tests.helpers.kv_exits import exits, reset_then_crowded, reset_while_deciding
from tests.helpers.kv_gate import FILE
from tests.helpers.kv_turns import conversations, otherwise, preempted, reset
from tests.helpers.pictures import noise
from tests.reference import Request

#: A cache that a crowd outgrows.
SMALL_CACHE: dict[str, Any] = {
    "num_gpu_blocks_override": 250,
    "max_model_len": 448,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 12,
}


def scenario_grid(checkpoint: str) -> dict[str, Any]:
    """The grid in one batch and one at a time; then everything else an engine with K = 2 must do."""
    engine = Engine(
        checkpoint,
        prune_layer=2,
        # for requests that say nothing; the scenarios' own say all
        default_preset="balanced",
        block_size=32,
        num_gpu_blocks_override=150,
    )
    free = engine.pool.get_num_free_blocks()
    result: dict[str, Any] = {"batch": engine.run(grid()), "single": [engine.run([r])[0] for r in alone()]}
    result["traffic"] = traffic(engine, (0.25,))
    engine.llm.reset_prefix_cache()
    result["unpruned"] = engine.run(unpruned())
    result["pool"] = pool_during(engine, Request(QUESTION, (noise(0),), kv_keep=0.25, max_tokens=8))
    result |= behaviours(engine)
    result |= events(engine)
    result["free"] = free
    if engine.is_v2:
        result["graphs"] = graphs(engine)
    result["blocks_lost"] = free - engine.pool.get_num_free_blocks()
    result["runner"] = {
        "v2": engine.is_v2,
        "scheduler": type(engine.scheduler).__name__,
        "steps_ahead": engine.core.batch_queue_size,
    }
    return result


def scenario_cuda(checkpoint: str) -> dict[str, Any]:
    """The grid on a GPU, with CUDA graphs; what an engine on the CPU must have told it is left out.

    What goes wrong in one part is recorded and does not hide the others.
    """
    engine = Engine(checkpoint, prune_layer=2, block_size=32, num_gpu_blocks_override=150)
    free = engine.pool.get_num_free_blocks()
    pruned = Request(QUESTION, (noise(0),), kv_keep=0.25, max_tokens=8)
    result: dict[str, Any] = {
        "batch": engine.run(grid()),
        "v2": engine.is_v2,
        "graphs": engine.core.vllm_config.compilation_config.cudagraph_mode.name,
        "errors": {},
    }
    parts: dict[str, Callable[[], Any]] = {
        "single": lambda: [engine.run([r])[0] for r in alone()],
        "unpruned": lambda: engine.run(unpruned()),
        "pool": lambda: pool_during(engine, pruned),
        "running": lambda: capacity(engine),
        "crowd": lambda: preempted_and_aborted(engine),
        "reset": lambda: reset_while_running(engine),
        "reset_abort": lambda: reset_then_abort(engine),
        "dummy_runs": lambda: dummy_runs_between(engine),
    }
    for name, part in parts.items():
        try:
            result[name] = part()
        except Exception:
            result["errors"][name] = traceback.format_exc()
    result["blocks_lost"] = free - engine.pool.get_num_free_blocks()
    return result


def pool_during(engine: Engine, request: Request) -> dict[str, Any]:
    """A batch of 12 of a request: blocks by group and request, before, during and after."""
    before = engine.pool.get_num_free_blocks()
    for i in range(12):
        engine.add(request, f"pool-{i}")
    steps = engine.steps()
    next(steps)
    while len(engine.scheduler.running) < 12:
        next(steps)
    held = [engine.blocks(engine.internal_id(f"pool-{i}")) for i in range(12)]
    during = engine.pool.get_num_free_blocks()
    for _ in steps:
        pass
    specs = [g.kv_cache_spec for g in engine.scheduler.kv_cache_config.kv_cache_groups]
    return {
        "before": before,
        "during": during,
        "after": engine.pool.get_num_free_blocks(),
        "held": held,
        "groups": [type(s).__name__ for s in specs],
        "bands": [s.band for s in specs],
        "block_size": specs[0].block_size,
    }


def behaviours(engine: Engine) -> dict[str, Any]:
    """Aborts, n > 1, structured output, prompt log-probabilities, unreadable settings, long prompts."""
    from vllm.sampling_params import StructuredOutputsParams

    pruned = Request(QUESTION, (noise(0),), kv_keep=0.25)  # grid()[6]
    found: dict[str, Any] = {}
    prompt, params = engine.prompt(pruned), engine.params(pruned, n=3, temperature=1.0, top_k=1)
    found["n3"] = [answer(engine.llm.generate(prompt, params, use_tqdm=False)[0], i) for i in range(3)]
    found["choice"] = engine.run(
        [pruned], structured_outputs=StructuredOutputsParams(choice=["yes", "no"]), ignore_eos=False
    )[0]
    found["refused"] = [refusal(engine, pruned, prompt_logprobs=1)]
    for bad in ("0.5", {"kv_keep": -1}, {"x": 1}):
        found["refused"].append(refusal(engine, pruned, extra_args={"vtprune": bad}))
    # 1009 tokens are the longest of this engine: a step takes 1024 and 15 others may be decoding
    long = Request("<s>" + "x" * 1009, kv_keep=0.5, max_tokens=4)
    found["too_long"] = engine.run([long, pruned])
    found["unpruned_reasons"] = dict(engine.scheduler.unpruned)

    for i in range(6):
        engine.add(Request(QUESTION, (noise(i),), kv_keep=0.3, max_tokens=50), f"abort-{i}")
    for step, _ in enumerate(engine.steps()):
        if step in (1, 3, 5):
            engine.llm.llm_engine.abort_request([f"abort-{step}"])
    found["plans_left"] = len(engine.scheduler.prompt_plans)
    return found


def scenario_preemption(checkpoint: str) -> dict[str, Any]:
    """A cache too small for the crowd, K = 1, and prompts of others chunked between those taken whole."""
    engine = Engine(
        checkpoint,
        prune_layer=1,
        relevance="last_token",
        block_size=32,
        **SMALL_CACHE,
    )
    free = engine.pool.get_num_free_blocks()
    return {
        "answers": engine.run(crowd()),
        "preemptions": engine.metric("vllm:num_preemptions"),
        "blocks_lost": free - engine.pool.get_num_free_blocks(),
    }


def scenario_capacity(checkpoint: str) -> dict[str, Any]:
    """How many requests run at once in a cache of 150 blocks, by kv_keep. Rates without rotary embedding."""
    engine = Engine(
        checkpoint,
        prune_layer=2,
        relevance="no_rope",
        block_size=32,
        num_gpu_blocks_override=150,
        max_model_len=256,
        max_num_batched_tokens=8192,
        max_num_seqs=64,
        enable_prefix_caching=False,  # else equal prompts share blocks
    )
    running = {}
    for keep in (1.0, 0.5, 0.25):
        for i in range(40):
            engine.add(Request(QUESTION, (noise(0),), kv_keep=keep, max_tokens=2), f"{keep}-{i}")
        running[keep] = max(len(engine.scheduler.running) for _ in engine.steps())
    small = [r for r in corners() if len(r.images) == 1]
    return {"free": engine.pool.get_num_free_blocks(), "running": running, "answers": engine.run(small)}


def scenario_top(checkpoint: str) -> dict[str, Any]:
    """K at the top end, the two halves traced by torch.compile."""
    engine = Engine(checkpoint, prune_layer=5, enforce_eager=False)
    return {"batch": engine.run(grid()), "compiled": engine.core.vllm_config.compilation_config.mode.name}


def scenario_tensor_parallel(checkpoint: str) -> dict[str, Any]:
    """Two ranks, each with half of the heads: they must keep the same tokens."""
    gate = f"{checkpoint}/{FILE}"
    engine = Engine(checkpoint, prune_layer=2, prune_gate=gate, tensor_parallel_size=2)
    return {"batch": engine.run(ungated(corners())), "gated": engine.run(gate_cases())}


def scenario_bands(checkpoint: str) -> dict[str, Any]:
    """Three prune layers: a mixed batch, alone, and the block pool; then a gate at the second."""
    gate = f"{checkpoint}/{FILE}"
    engine = Engine(
        checkpoint, **BANDS["bands"], prune_gate=gate, block_size=32, num_gpu_blocks_override=1000
    )
    free = engine.pool.get_num_free_blocks()
    request = Request(QUESTION, (noise(0),), kv_keep=(0.5, 0.25, 0.0), max_tokens=8)
    return {
        "batch": engine.run(ungated(band_cases())),
        "single": [engine.run([r])[0] for r in ungated(band_cases()[:6])],
        "pool": pool_during(engine, request),
        "gated": engine.run(gate_cases()),
        "gated_single": [engine.run([r])[0] for r in gate_cases()[:4]],
        "exits": exits(engine, gate_cases()[:8]),
        "blocks_lost": free - engine.pool.get_num_free_blocks(),
        "decoder": engine.llm.apply_model(_bands)[0],
    }


def scenario_bands_preemption(checkpoint: str) -> dict[str, Any]:
    """A cache too small for the crowd, and an exit."""
    # fewer blocks than with one prune layer: the bands above take less
    small = {**SMALL_CACHE, "num_gpu_blocks_override": 90}
    gate = f"{checkpoint}/{FILE}"
    engine = Engine(checkpoint, **BANDS["bands_preemption"], prune_gate=gate, block_size=32, **small)
    free = engine.pool.get_num_free_blocks()
    found: dict[str, Any] = {
        "answers": engine.run(ungated(band_crowd())),
        "preemptions": engine.metric("vllm:num_preemptions"),
        "gated_reset": reset_while_deciding(engine, gate_crowd(max_tokens=30)),
    }
    # one whose tokens leave; where there is none, tests say so
    leaver = next((i for i, a in enumerate(found["gated_reset"]["answers"]) if a["gate"]), 0)
    crowded = reset_then_crowded(engine, gate_crowd(), leaver)
    found |= {"gated": crowded.pop("answers"), "gated_crowd": crowded}
    return found | {
        "blocks_lost": free - engine.pool.get_num_free_blocks(),
        "decoder": engine.llm.apply_model(_bands)[0],
    }


def scenario_bands_compiled(checkpoint: str) -> dict[str, Any]:
    """Four prune layers, bands traced by torch.compile, other ratings, and a gate at the second."""
    gate = f"{checkpoint}/{FILE}"
    compiled = {"enforce_eager": False, "num_gpu_blocks_override": 1000}
    engine = Engine(checkpoint, **BANDS["bands_compiled"], prune_gate=gate, **compiled)
    found: dict[str, Any] = {
        "batch": engine.run(ungated(band_cases())),
        "gated": engine.run(gate_cases()),
        "decoder": engine.llm.apply_model(_bands)[0],
        "weights": engine.llm.apply_model(_weights)[0],
    }
    if engine.is_v2 and engine.runner.device.type == "cpu":  # on a GPU they are no act
        found["piecewise"] = piecewise_graphs(engine)
    return found


def scenario_turns(checkpoint: str) -> dict[str, Any]:
    """Conversations whose later turns go on from what the first one kept, at two prune layers."""
    # half of the conversations' last turns fit, and the crowd of `preempted` does not
    cache = {"block_size": TURNS_BLOCK, "num_gpu_blocks_override": 150, "max_num_seqs": 12}
    engine = Engine(checkpoint, **TURNS, kv_reuse=True, **cache)
    free = engine.pool.get_num_free_blocks()
    found = conversations(engine)
    return {
        **found,
        "otherwise": otherwise(engine, found),
        "reset": reset(engine, found["asked"][1][:6]),
        "preempted": preempted(engine, found),
        "blocks_lost": free - engine.pool.get_num_free_blocks(),
        "runner": {"v2": engine.is_v2, "scheduler": type(engine.scheduler).__name__},
    }


def scenario_text_only(checkpoint: str) -> dict[str, Any]:
    """A server that takes no pictures: vLLM gives the decoder token ids, and it embeds them itself.

    It is told that there are CUDA graphs, which read the embeddings at the address they were captured with.
    """
    engine = Engine(checkpoint, prune_layer=2, limit_mm_per_prompt={"image": 0})
    decoder = engine.runner.get_model().language_model.model
    decoder.buffers._graphs = True
    lowest = decoder.bands[0].forward
    addresses = set()

    def looked_at(positions: torch.Tensor, embeddings: torch.Tensor, *args: Any) -> Any:
        addresses.add(embeddings.data_ptr())
        return lowest(positions, embeddings, *args)

    decoder.bands[0].forward = looked_at
    return {"answers": engine.run(texts()), "addresses": len(addresses)}


def scenario_no_layer(checkpoint: str) -> dict[str, Any]:
    """The plugin without a prune layer."""
    engine = Engine(checkpoint)
    return {
        "unpruned": engine.run(unpruned()),
        "scheduler": type(engine.scheduler).__module__,
        "worker": engine.core.vllm_config.parallel_config.worker_cls,
        "decoder": engine.llm.apply_model(_decoder_module)[0],
    }


def scenario_plain(checkpoint: str) -> dict[str, Any]:
    """Plain vLLM, without the plugin."""
    engine = Engine(checkpoint, plugin=False, block_size=32)
    return {"unpruned": engine.run(unpruned()), "traffic": traffic(engine, ())}


def traffic(engine: Engine, shares: Sequence[float]) -> dict[str, Any]:
    """Four unpruned requests twice over, pruned ones after each; vLLM's own prefix-cache counters."""
    engine.llm.reset_prefix_cache()
    names = ("vllm:prefix_cache_hits", "vllm:prefix_cache_queries")
    before = [engine.metric(name) for name in names]
    cached = []
    for request in unpruned()[::2] * 2:
        cached.append(engine.run([request], max_tokens=2)[0]["cached"])
        for keep in shares:
            pruned = Request(request.prompt, request.images, kv_keep=keep)
            if engine.run([pruned], max_tokens=2)[0]["cached"]:
                raise RuntimeError("a pruned request read the prefix cache")
    hits, queries = (engine.metric(name) - value for name, value in zip(names, before, strict=True))
    return {"cached": cached, "hits": hits, "queries": queries}


def _decoder_module(model: Any) -> str:
    return type(model.language_model).__module__


def _bands(model: Any) -> tuple[str, list[tuple[str, int, bool]]]:
    """The decoder's class in vLLM; name, layers and whether it is compiled of each band."""
    decoder = model.language_model.model
    bands = [(type(b).__name__, len(b.layers), not b.do_not_compile) for b in decoder.bands]
    return type(decoder).__mro__[1].__name__, bands


def _weights(model: Any) -> dict[str, Any]:
    """The names of its weights, as vLLM's loaders see them, and how many weights there are."""
    parameters = list(model.named_parameters(remove_duplicate=False))
    return {
        "names": [name for name, _ in parameters],
        "state": list(model.state_dict()),
        "tensors": len({id(parameter) for _, parameter in parameters}),
    }


SCENARIOS: dict[str, Callable[[str], dict[str, Any]]] = {
    "grid": scenario_grid,
    "cuda": scenario_cuda,
    "preemption": scenario_preemption,
    "capacity": scenario_capacity,
    "top": scenario_top,
    "tensor_parallel": scenario_tensor_parallel,
    "bands": scenario_bands,
    "bands_preemption": scenario_bands_preemption,
    "bands_compiled": scenario_bands_compiled,
    "turns": scenario_turns,
    "text_only": scenario_text_only,
    "no_layer": scenario_no_layer,
    "plain": scenario_plain,
}

if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    name, folder, out = sys.argv[1:]
    torch.save(SCENARIOS[name](folder), out)
