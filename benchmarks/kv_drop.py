# SPDX-License-Identifier: Apache-2.0
"""What dropping prompt tokens from the KV cache gains, without a server around it.

    python -m benchmarks.kv_drop                     # decoder-150m, kv_keep 1, 0.5, 0.25, three rounds
    python -m benchmarks.kv_drop --rounds 5 --keep 1,0.5 --json out.json
    python -m benchmarks.kv_drop --borders 1,2,3 --rounds 6    # as many prune layers, at equal FLOPs

Engines, one of vLLM without the plugin and others with prune layers, run in processes of their own and are
measured in each round in an order of its own, so that drift of the machine hits all alike. With `--borders`
each engine has that many prune layers, spaced evenly, whose shares make the prefill cost as many operations
as the model's own prune layer with half of the visual tokens; each is measured with nothing dropped, too,
which shows what its KV-cache groups cost a step. Pictures are distinct: no cache helps. Time to first token
and time of a decode step are one request's alone; throughput is that of a batch given all at once. Ratios are
to vLLM without the plugin, taken within each round; median and range (from six rounds up the 95 % interval)
are printed.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.bands import equal_cost, prefill_flops
from benchmarks.commands import bench_parser, write_json
from benchmarks.interleaved import REST_S
from benchmarks.models import MODELS, BenchModel, model_named
from benchmarks.rounds import Rounds, decimal, shuffled
from vllm_vtprune.kv_drop.schedule import MOST_PRUNE_LAYERS, PruneLayer
from vtprune_eval.flops import CostShape
from vtprune_eval.setting import AS_SCHEDULED
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import command
from vtprune_loadtest.errors import LoadTestError

PLAIN = "vllm"
_WIDTH = 140
_STEPS = 32
#: Requests alone in each sample, the median of which counts.
_ALONE = 3
#: Of `QUESTION` in the byte tokens of the benchmark's models, the picture aside.
_TEXT_TOKENS = 67
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
    pipe: Connection, model: BenchModel, prune_layers: str, batch: int, output: int, eager: bool
) -> None:
    """The engine's process: answers each received (kv_keep, seed) with a `EngineSample`.

    Args:
        pipe: to the measuring process.
        model: what is served.
        prune_layers: as an operator writes them; empty for vLLM without the plugin.
        batch: requests at once.
        output: output tokens of each.
        eager: without torch.compile.
    """
    os.environ["VLLM_PLUGINS"] = "vtprune" if prune_layers else ""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # to read the block pool
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(model.kv_cache_gb or 4))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    from vllm_vtprune import engine_kwargs

    extra = engine_kwargs(prune_layers=prune_layers) if prune_layers else {}
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


def arms(model: BenchModel, shares: Sequence[float]) -> dict[str, tuple[str, float]]:
    """Label -> (prune layers, kv_keep), at the model's own prune layer."""
    own = str(model.prune_layer)
    return {PLAIN: ("", 1.0), **{f"kv_keep {share:g}": (own, share) for share in shares}}


def arms_by_borders(model: BenchModel, numbers: Sequence[int]) -> dict[str, tuple[str, float]]:
    """Label -> (prune layers, kv_keep): so many prune layers at equal FLOPs, and with nothing dropped."""
    shape = CostShape.of(model.folder)
    text = _TEXT_TOKENS
    half = (PruneLayer(model.prune_layer, 0.5, "vision"),)
    budget = prefill_flops(shape, text, shape.patches, half)
    compared = {PLAIN: ("", 1.0)}
    for number in numbers:
        layers = ",".join(map(str, equal_cost(shape, text, shape.patches, number, budget)))
        compared[f"{number}: {layers}"] = layers, AS_SCHEDULED.keep
        compared[f"{number}: nothing dropped"] = layers, 1.0
    return compared


@contextlib.contextmanager
def engines(
    model: BenchModel, schedules: Sequence[str], batch: int, output: int, eager: bool
) -> Iterator[Callable[[str, float, int], EngineSample]]:
    """An engine for each schedule, started one by one, as one function of (schedule, kv_keep, seed)."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for prune_layers in schedules:
        pipes[prune_layers], far = context.Pipe()
        arguments = (far, model, prune_layers, batch, output, eager)
        process = context.Process(target=serve, args=arguments, daemon=True)
        process.start()
        far.close()
        processes.append(process)
        pipes[prune_layers].recv()

    def measured(prune_layers: str, keep: float, seed: int) -> EngineSample:
        # the last engine's worker still polls, on a core of this one's
        time.sleep(REST_S)
        pipes[prune_layers].send((keep, seed))
        sample: EngineSample = pipes[prune_layers].recv()
        return sample

    yield measured
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(60)


def table(rounds: Rounds[EngineSample]) -> str:
    """A line for each arm: medians over rounds, and ratios to vLLM within each round with their interval."""
    rows = []
    for label in rounds.labels:
        ratios = [rounds.spread(label, name) for name in ("ttft_s", "step_s", "tokens_per_s")]
        rows.append(
            [
                label,
                decimal(rounds.median(label, "kv_mib"), 2),
                decimal(rounds.median(label, "ttft_s"), 3),
                decimal(1000 * (rounds.median(label, "step_s") or math.nan), 2),
                decimal(rounds.median(label, "tokens_per_s"), 1),
                *(f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" for ratio in ratios),
            ]
        )
    interval = rounds.spread(PLAIN, "ttft_s").interval
    header = ["arm", "KV MiB", "TTFT s", "step ms", "tokens/s", f"TTFT ratio ({interval})", "step ratio"]
    header.append("throughput ratio")
    return "\n".join(columns(header, rows, width=_WIDTH))


def _numbers(text: str) -> list[int]:
    numbers = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if not all(1 <= number <= MOST_PRUNE_LAYERS for number in numbers):
        raise LoadTestError(f"--borders must be numbers of 1 to {MOST_PRUNE_LAYERS}, such as 1,2,3.")
    return numbers


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.kv_drop") -> int:
    """Run the command; gives the exit status."""
    return command(prog, lambda: _run(argv, prog))


def _run(argv: Sequence[str] | None, prog: str) -> None:
    parser = bench_parser(prog, "What dropping prompt tokens from the KV cache gains, without a server.")
    parser.add_argument("--model", default="decoder-150m", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--keep", default="1,0.5,0.25", help="kv_keep of the arms, separated by commas")
    parser.add_argument("--borders", help="numbers of prune layers to compare at equal FLOPs, such as 1,2,3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="requests at once")
    parser.add_argument("--output", type=int, default=16, help="output tokens per request")
    parser.add_argument("--compile", action="store_true", help="torch.compile instead of eager execution")
    options = parser.parse_args(argv)
    model = model_named(options.model, options.model_dir)
    if options.borders:
        compared = arms_by_borders(model, _numbers(options.borders))
    else:
        compared = arms(model, [float(share) for share in options.keep.split(",")])
    where = machine.describe()
    print(machine.one_line(where))
    schedules = list(dict.fromkeys(prune_layers for prune_layers, _ in compared.values()))
    print(f"{options.model}, {len(schedules)} engines: {options.batch} requests at once, ", end="")
    print(f"{options.output} output tokens each")
    rounds: Rounds[EngineSample] = Rounds(list(compared))
    rng = np.random.default_rng(0)
    with engines(model, schedules, options.batch, options.output, not options.compile) as measured:
        for number in range(options.rounds):
            for label in shuffled(list(compared), rng):
                rounds.blocks[label].append(measured(*compared[label], number))
            print(f"round {number + 1} of {options.rounds} done", flush=True)
    print(table(rounds))
    samples = [
        {label: asdict(blocks[number]) for label, blocks in rounds.blocks.items()}
        for number in range(len(rounds))
    ]
    arguments = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
    }
    write_json(options.json, {"machine": where, "arguments": arguments, "rounds": samples})


if __name__ == "__main__":
    sys.exit(main())
