# SPDX-License-Identifier: Apache-2.0
"""The engine's process of `benchmarks.kv_drop`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import numpy as np

#: Decode steps of a request alone.
_STEPS = 32
#: Requests alone in each sample, the median of which counts.
_ALONE = 3
QUESTION = "<s>USER: <image>\nWhat is in this picture, and what is it made of? ASSISTANT:"


@dataclass(frozen=True)
class EngineSample:
    """One arm in one round.

    Attributes:
        ttft_s: time to first token of a request alone, seconds; the median of three.
        step_s: a decode step of a request alone, seconds; the median over theirs.
        tokens_per_s: prompt and output tokens per second of the batch.
        kv_mib: KV cache that one request's prompt holds, MiB.
    """

    ttft_s: float
    step_s: float
    tokens_per_s: float
    kv_mib: float


def serve(
    pipe: Connection,
    folder: str,
    policy: Mapping[str, Any],
    checkout: str,
    kv_cache_gb: int,
    batch: int,
    output: int,
    eager: bool,
) -> None:
    """The engine's process: answers each received (kv_keep, seed) with an `EngineSample`.

    Args:
        pipe: to the measuring process.
        folder: of the checkpoint that is served.
        policy: fields of the plugin's `PrunePolicy`; empty for vLLM without the plugin.
        checkout: a folder whose packages are imported instead of these; empty for none.
        kv_cache_gb: GiB of the KV cache.
        batch: requests at once.
        output: output tokens of each.
        eager: without torch.compile.
    """
    if checkout:
        paths = [checkout, os.path.join(checkout, "server")]
        sys.path[:0] = paths
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.chdir(checkout)  # vLLM inspects models by `python -m`, which imports from here first
        # a spawned process has imported the command, and this checkout's packages with it
        for name in [n for n in sys.modules if n.startswith(("vllm_vtprune", "vtprune_"))]:
            del sys.modules[name]
    os.environ["VLLM_PLUGINS"] = "vtprune" if policy else ""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # to read the block pool
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_cache_gb))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    import vllm_vtprune

    if checkout and not str(vllm_vtprune.__file__).startswith(checkout):
        raise RuntimeError(f"{vllm_vtprune.__file__} was imported instead of {checkout}'s.")
    extra = vllm_vtprune.engine_kwargs(**policy) if policy else {}
    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=eager,
        max_num_seqs=batch,
        max_model_len=1024,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        **extra,
    )
    _measure(llm, 1.0, -1, batch, output)  # kernels and the tower are loaded on first use
    pipe.send("ready")
    for keep, seed in iter(pipe.recv, None):
        pipe.send(_measure(llm, keep, seed, batch, output))


def _measure(llm: Any, keep: float, seed: int, batch: int, output: int) -> EngineSample:
    from PIL import Image
    from vllm import SamplingParams

    from vllm_vtprune import request_kwargs

    generator = np.random.default_rng(seed + 1)
    tokens = llm.get_tokenizer()(QUESTION, add_special_tokens=False).input_ids
    extra_args = request_kwargs(kv_keep=keep)[1] if keep < 1 else None

    def prompts(count: int) -> list[dict[str, Any]]:
        pixels = generator.integers(0, 255, (count, 336, 336, 3), dtype=np.uint8)
        images = [Image.fromarray(p) for p in pixels]
        return [{"prompt_token_ids": tokens, "multi_modal_data": {"image": image}} for image in images]

    def of_length(length: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, extra_args=extra_args)

    engine = llm.llm_engine
    waits, steps = [], []
    for number, asked in enumerate(prompts(_ALONE)):
        first, *following = _token_times(engine, f"alone-{number}", asked, of_length(1 + _STEPS))
        waits.append(first)
        steps += following
    together = prompts(batch)
    start = time.perf_counter()
    outputs = llm.generate(together, of_length(output), use_tqdm=False)
    seconds = time.perf_counter() - start
    engine.add_request("blocks", prompts(1)[0], of_length(2))
    engine.step()
    scheduler = engine.engine_core.engine_core.scheduler
    pool, cache = scheduler.kv_cache_manager.block_pool, scheduler.kv_cache_config
    held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # block 0 is never given out
    # a block is a page of every layer of a group
    block_mib = (
        max(len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in cache.kv_cache_groups) / 2**20
    )
    while engine.has_unfinished_requests():
        engine.step()
    return EngineSample(
        ttft_s=median(waits),
        step_s=median(steps),
        tokens_per_s=batch * (len(outputs[0].prompt_token_ids) + output) / seconds,
        kv_mib=held * block_mib,
    )


def _token_times(engine: Any, name: str, prompt: Mapping[str, Any], params: Any) -> list[float]:
    """Seconds from a request to its first token, preprocessing included, and from each token to the next."""
    before, times = time.perf_counter(), []
    engine.add_request(name, prompt, params)
    while engine.has_unfinished_requests():
        if engine.step():
            now = time.perf_counter()
            times.append(now - before)
            before = now
    return times
