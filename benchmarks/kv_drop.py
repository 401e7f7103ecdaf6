# SPDX-License-Identifier: Apache-2.0
"""What dropping prompt tokens from the KV cache gains, without a server around it.

    python -m benchmarks.kv_drop                     # decoder-150m, kv_keep 1, 0.5, 0.25, three rounds
    python -m benchmarks.kv_drop --rounds 5 --keep 1,0.5 --json out.json

Two engines, one of vLLM without the plugin and one with a prune layer, run in processes of their own and are
measured in turn within each round, so that drift of the machine hits all alike. Pictures are distinct: no
cache helps. Time to first token is one request's alone; throughput is that of a batch given all at once.
Ratios are to vLLM without the plugin, taken within each round; median and range over rounds are printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import machine
from benchmarks.models import BenchModel, model_named

PLAIN = "vllm"
QUESTION = "<s>USER: <image>\nWhat is in this picture, and what is it made of? ASSISTANT:"


@dataclass(frozen=True)
class Sample:
    """One arm in one round.

    Attributes:
        ttft_s: time to first token of one request alone, seconds.
        tokens_per_s: prompt and output tokens per second of the batch.
        kv_mib: KV cache that one request's prompt holds, MiB.
    """

    ttft_s: float
    tokens_per_s: float
    kv_mib: float


def serve(pipe: Connection, model: BenchModel, plugin: bool, batch: int, output: int, eager: bool) -> None:
    """The engine's process: answers each received (kv_keep, seed) with a `Sample`."""
    os.environ["VLLM_PLUGINS"] = "vtprune" if plugin else ""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # to read the block pool
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(model.kv_cache_gb or 4))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    from vllm_vtprune import engine_kwargs

    extra = engine_kwargs(prune_layer=model.prune_layer) if plugin else {}
    llm = LLM(
        str(model.folder),
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


def _measure(llm: Any, keep: float, seed: int, batch: int, output: int) -> Sample:
    import numpy as np
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

    def generate(count: int, length: int) -> tuple[float, int]:
        params = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, extra_args=extra_args)
        asked = prompts(count)
        start = time.perf_counter()
        outputs = llm.generate(asked, params, use_tqdm=False)
        return time.perf_counter() - start, len(outputs[0].prompt_token_ids)

    ttft, prompt_tokens = generate(1, 1)
    seconds, _ = generate(batch, output)
    engine = llm.llm_engine
    engine.add_request(
        "blocks", prompts(1)[0], SamplingParams(max_tokens=2, ignore_eos=True, extra_args=extra_args)
    )
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
    return Sample(ttft, batch * (prompt_tokens + output) / seconds, held * block_mib)


def arms(shares: Sequence[float]) -> dict[str, tuple[bool, float]]:
    """Label -> (with the plugin, kv_keep)."""
    return {PLAIN: (False, 1.0), **{f"kv_keep {share:g}": (True, share) for share in shares}}


def measure(
    model: BenchModel, shares: Sequence[float], rounds: int, batch: int, output: int, eager: bool
) -> Iterator[dict[str, Sample]]:
    """One dict of samples, by arm, per round; the arms' order turns from round to round."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[bool, Connection] = {}
    processes = []
    for plugin in (False, True):
        pipes[plugin], far = context.Pipe()
        process = context.Process(target=serve, args=(far, model, plugin, batch, output, eager), daemon=True)
        process.start()
        far.close()
        processes.append(process)
        pipes[plugin].recv()
    labels = list(arms(shares).items())
    for number in range(rounds):
        samples = {}
        turn = number % len(labels)
        for label, (plugin, keep) in labels[turn:] + labels[:turn]:
            pipes[plugin].send((keep, number))
            samples[label] = pipes[plugin].recv()
        yield samples
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(60)


def report(results: Sequence[dict[str, Sample]], labels: Sequence[str]) -> str:
    """The table: medians over rounds, and ratios to vLLM within each round with their range."""
    lines = [
        "arm             KV MiB   TTFT s   tokens/s   TTFT ratio (range)        throughput ratio (range)"
    ]
    for label in labels:
        samples = [r[label] for r in results]
        ttft = [r[label].ttft_s / r[PLAIN].ttft_s for r in results]
        speed = [r[label].tokens_per_s / r[PLAIN].tokens_per_s for r in results]
        seconds = statistics.median(s.ttft_s for s in samples)
        rate = statistics.median(s.tokens_per_s for s in samples)
        numbers = f"{samples[0].kv_mib:>8.2f} {seconds:>8.3f} {rate:>10.1f}"
        lines.append(f"{label:<13} {numbers}   {_spread(ttft):<25} {_spread(speed)}")
    return "\n".join(lines)


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="decoder-150m", help="demo, decoder-150m or llava-1.5-7b")
    parser.add_argument("--keep", default="1,0.5,0.25", help="kv_keep of the arms, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="requests at once")
    parser.add_argument("--output", type=int, default=16, help="output tokens per request")
    parser.add_argument("--compile", action="store_true", help="torch.compile instead of eager execution")
    parser.add_argument("--json", help="file for every sample")
    options = parser.parse_args(argv)
    shares = [float(share) for share in options.keep.split(",")]
    model = model_named(options.model)
    where = machine.describe()
    print(machine.one_line(where))
    print(f"{options.model}, prune layer {model.prune_layer}: {options.batch} requests at once, ", end="")
    print(f"{options.output} output tokens each")
    results = []
    for samples in measure(model, shares, options.rounds, options.batch, options.output, not options.compile):
        results.append(samples)
        print(f"round {len(results)} of {options.rounds} done", flush=True)
    print(report(results, list(arms(shares))))
    if options.json:
        rounds = [{label: asdict(sample) for label, sample in r.items()} for r in results]
        with open(options.json, "w") as file:
            json.dump({"machine": where, "arguments": vars(options), "rounds": rounds}, file, indent=1)


if __name__ == "__main__":
    main()
