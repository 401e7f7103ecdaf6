# SPDX-License-Identifier: Apache-2.0
"""Drives a real engine through one scenario of stage 2 and saves what it saw.

    python -m tests.engine.kv_run SCENARIO CHECKPOINT OUT

The engine core runs in this process, so that its block pool can be looked at, and each scenario has a process of
its own, since a plugin cannot be unloaded.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from tests.pictures import noise, scene
from tests.reference import Request

QUESTION = "<s>USER: <image>\nwhat color is the circle ? ASSISTANT:"
TWO = "<s>USER: <image>\n<image> compare</s> the two. ASSISTANT:"
TEXT = "<s>USER: " + "a story that goes on and on. " * 9 + "ASSISTANT:"


def grid() -> list[Request]:
    """Both stages, both scopes, shares from all to the minimum, no, one and two images."""
    cases = [
        Request(QUESTION, (noise(0),), kv_keep=keep, kv_scope=scope)
        for keep, scope in itertools.product((1.0, 0.75, 0.5, 0.25, 0.001), ("all", "vision"))
    ]
    return [
        *cases,
        Request(QUESTION, (scene(),), aggressiveness=0.5, kv_keep=0.4),
        Request(TWO, (noise(1), noise(2)), kv_keep=0.3, max_tokens=40),
        Request(TWO, (noise(1), scene(9)), aggressiveness=0.4, kv_keep=0.6, kv_scope="vision"),
        Request(TWO, (noise(3), scene(9)), keep_ratio=0.25, kv_keep=0.25),
        Request(TEXT, kv_keep=0.4, max_tokens=70),
        Request(TEXT, kv_keep=0.001),
    ]


def crowd() -> list[Request]:
    """Ten requests that together outgrow a small cache."""
    shares = (0.25, 0.5, 1.0, 0.3, 0.75, 0.001, 0.4, 1.0, 0.6, 0.2)
    return [Request(QUESTION, (noise(i),), kv_keep=k, max_tokens=90) for i, k in enumerate(shares)]


def unpruned() -> list[Request]:
    """Requests that every engine must answer alike."""
    texts = [Request(TEXT.replace("story", word)) for word in ("story", "tale", "poem")]
    images = [Request(QUESTION, (noise(i),)) for i in range(3)]
    return [*texts, *images, Request(TWO, (noise(0), noise(1)))]


class Engine:
    """vLLM's `LLM` on a small checkpoint, with what the scenarios ask of it."""

    def __init__(
        self, checkpoint: str, *, prune_layer: int | None = None, plugin: bool = True, **kwargs: Any
    ):
        from vllm import LLM

        from vllm_vtprune import engine_kwargs

        policy = {"prune_layer": prune_layer} if prune_layer else {}
        self.llm = LLM(
            checkpoint,
            dtype="float32",
            **{
                "enforce_eager": True,
                "max_num_seqs": 16,
                "max_model_len": 1024,
                "max_num_batched_tokens": 1024,
                "limit_mm_per_prompt": {"image": 4},
                "disable_log_stats": False,
                **(engine_kwargs(**policy) if plugin else {}),
                **kwargs,
            },
        )
        self.plugin = plugin
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool

    def prompt(self, request: Request) -> dict[str, Any]:
        from vllm_vtprune import request_kwargs

        tokens = self.llm.get_tokenizer()(request.prompt, add_special_tokens=False).input_ids
        prompt: dict[str, Any] = {"prompt_token_ids": tokens}
        if request.images:
            prompt["multi_modal_data"] = {"image": list(request.images)}
            ratio = {"keep_ratio": request.keep_ratio}
            knee = {"aggressiveness": request.aggressiveness}
            if self.plugin:
                prompt["mm_processor_kwargs"] = request_kwargs(**(ratio if request.keep_ratio else knee))[0]
        return prompt

    def params(self, request: Request, **kwargs: Any) -> Any:
        from vllm import SamplingParams

        from vllm_vtprune import request_kwargs

        extra_args = request_kwargs(kv_keep=request.kv_keep, kv_scope=request.kv_scope)[1]
        defaults = {
            "temperature": 0,
            "max_tokens": request.max_tokens,
            "ignore_eos": True,
            "logprobs": 0,
            "extra_args": extra_args if self.plugin else None,
        }
        return SamplingParams(**{**defaults, **kwargs})

    def run(self, requests: Sequence[Request], **kwargs: Any) -> list[dict[str, Any]]:
        """Answers of a batch given all at once."""
        outputs = self.llm.generate(
            [self.prompt(r) for r in requests], [self.params(r, **kwargs) for r in requests], use_tqdm=False
        )
        return [answer(o) for o in outputs]

    def metric(self, name: str) -> float:
        """The value of one of vLLM's own counters."""
        return float(next(m.value for m in self.llm.get_metrics() if m.name == name))

    def blocks(self, request_id: str) -> list[int]:
        """Blocks the request holds, by KV-cache group."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        return [len(m.req_to_blocks.get(request_id, ())) for m in managers]

    def steps(self) -> Iterator[None]:
        """Run what was added, giving back control after every step."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()
            yield

    def add(self, request: Request, request_id: str, **kwargs: Any) -> None:
        self.llm.llm_engine.add_request(request_id, self.prompt(request), self.params(request, **kwargs))

    def internal_id(self, request_id: str) -> str:
        """vLLM appends to the ids it is given."""
        return next(i for i in self.scheduler.requests if i.startswith(request_id))


def answer(output: Any, index: int = 0) -> dict[str, Any]:
    """One completion as plain values."""
    completion = output.outputs[index]
    ids = list(completion.token_ids)
    logprobs = completion.logprobs and [d[t].logprob for d, t in zip(completion.logprobs, ids, strict=True)]
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
        "tokens": ids,
        "logprobs": logprobs,
        "text": completion.text,
    }


def scenario_grid(checkpoint: str) -> dict[str, Any]:
    """The grid in one batch and one at a time; then everything else an engine with K = 2 must do."""
    engine = Engine(checkpoint, prune_layer=2)
    free = engine.pool.get_num_free_blocks()
    result: dict[str, Any] = {"batch": engine.run(grid()), "single": [engine.run([r])[0] for r in grid()]}
    result["unpruned"] = engine.run(unpruned())
    result["pool"] = pool_during(engine)
    result |= behaviours(engine)
    result["blocks_lost"] = free - engine.pool.get_num_free_blocks()
    return result


def pool_during(engine: Engine) -> dict[str, Any]:
    """A batch of 16 at kv_keep 0.25: blocks by group and request, before, during and after."""
    request = Request(QUESTION, (noise(0),), kv_keep=0.25, max_tokens=8)
    before = engine.pool.get_num_free_blocks()
    for i in range(16):
        engine.add(request, f"pool-{i}")
    steps = engine.steps()
    next(steps)
    while len(engine.scheduler.running) < 16:
        next(steps)
    held = [engine.blocks(engine.internal_id(f"pool-{i}")) for i in range(16)]
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
        "block_size": specs[0].block_size,
    }


def behaviours(engine: Engine) -> dict[str, Any]:
    """Aborts, n > 1, structured output, prompt log-probabilities, unreadable settings, long prompts."""
    from vllm.sampling_params import StructuredOutputsParams

    pruned = Request(QUESTION, (noise(0),), kv_keep=0.5)
    found: dict[str, Any] = {}
    prompt, params = engine.prompt(pruned), engine.params(pruned, n=3)
    found["n3"] = [answer(engine.llm.generate(prompt, params, use_tqdm=False)[0], i) for i in range(3)]
    found["choice"] = engine.run(
        [pruned], structured_outputs=StructuredOutputsParams(choice=["yes", "no"]), ignore_eos=False
    )[0]
    found["prompt_logprobs"] = engine.run([pruned], prompt_logprobs=1)[0]
    found["bad_settings"] = [
        engine.run([pruned], extra_args={"vtprune": bad})[0] for bad in ("0.5", {"kv_keep": -1}, {"x": 1})
    ]
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
        block_size=32,
        num_gpu_blocks_override=250,
        max_model_len=448,
        max_num_batched_tokens=256,
        max_num_seqs=12,
    )
    free = engine.pool.get_num_free_blocks()
    return {
        "answers": engine.run(crowd()),
        "preemptions": engine.metric("vllm:num_preemptions"),
        "blocks_lost": free - engine.pool.get_num_free_blocks(),
    }


def scenario_top(checkpoint: str) -> dict[str, Any]:
    """K at the top end, the two halves traced by torch.compile."""
    engine = Engine(checkpoint, prune_layer=5, enforce_eager=False)
    return {"batch": engine.run(grid()), "compiled": engine.core.vllm_config.compilation_config.mode.name}


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
    """vLLM without the plugin."""
    engine = Engine(checkpoint, plugin=False)
    return {"unpruned": engine.run(unpruned()), "traffic": traffic(engine, ())}


def scenario_traffic(checkpoint: str) -> dict[str, Any]:
    """Unpruned traffic with pruned requests in between, which must neither use nor fill the prefix cache."""
    engine = Engine(checkpoint, prune_layer=3)
    return {"traffic": traffic(engine, (0.25, 0.5))}


def traffic(engine: Engine, shares: Sequence[float]) -> dict[str, Any]:
    """Seven unpruned requests twice over, two pruned ones after each; vLLM's own prefix-cache counters."""
    cached = []
    for request in [*unpruned(), *unpruned()]:
        cached.append(engine.run([request])[0]["cached"])
        for keep in shares:
            pruned = Request(request.prompt, request.images, kv_keep=keep)
            cached_pruned = engine.run([pruned])[0]["cached"]
            if cached_pruned:
                raise RuntimeError("a pruned request read the prefix cache")
    return {
        "cached": cached,
        "hits": engine.metric("vllm:prefix_cache_hits"),
        "queries": engine.metric("vllm:prefix_cache_queries"),
    }


def _decoder_module(model: Any) -> str:
    return type(model.language_model).__module__


SCENARIOS: dict[str, Callable[[str], dict[str, Any]]] = {
    "grid": scenario_grid,
    "preemption": scenario_preemption,
    "top": scenario_top,
    "no_layer": scenario_no_layer,
    "plain": scenario_plain,
    "traffic": scenario_traffic,
}

if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    name, folder, out = sys.argv[1:]
    torch.save(SCENARIOS[name](folder), out)
