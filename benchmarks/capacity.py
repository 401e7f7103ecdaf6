# SPDX-License-Identifier: Apache-2.0
"""Requests in flight at a fixed KV cache: as many as the counts say, with one, two and three prune layers.

    python -m benchmarks.capacity                    # halves at each of 1, 2 and 3 prune layers, and a gate
    python -m benchmarks.capacity --mib 96 --json out.json

Nothing is timed. An engine of each schedule has a KV cache of the same bytes; more requests than fit are
given to it at once, each with a picture of its own, and one step may take them all. How many run is predicted
from the counts alone (tokens of the prompt, shares, layers of each band, block size) and read off the
scheduler; the blocks that they hold are read off the block pool. With the gate, which here lets every picture
leave, each prompt takes the blocks of a whole one and returns most after its step; others are then let in.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.commands import bench_parser, write_json
from benchmarks.kv_drop_engine import QUESTION
from benchmarks.models import MODELS, BenchModel, model_named
from vllm_vtprune.fingerprint import fingerprint
from vllm_vtprune.kv_drop.schedule import band_groups, band_sizes, parse
from vllm_vtprune.kv_drop.shares import tokens_kept
from vtprune_eval.flops import CostShape
from vtprune_eval.setting import AS_SCHEDULED
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import command
from vtprune_loadtest.errors import LoadTestError

#: The least that the attention backend of the CPU takes.
BLOCK = 32
#: Output tokens; within a prompt's last block, so that nobody takes another while they run.
OUTPUT = 12
_WIDTH = 140
_MOST = 64
_LONGEST = 704


@dataclass(frozen=True)
class Arm:
    """One engine.

    Attributes:
        name: the arm's.
        prune_layers: as an operator writes them; empty for vLLM without the plugin.
        gate: whether a gate that always fires stands at the first prune layer.
    """

    name: str
    prune_layers: str = ""
    gate: bool = False


@dataclass(frozen=True)
class Counts:
    """What the counts say of an arm.

    Attributes:
        groups: KV-cache groups.
        blocks: of the engine's cache, all given out.
        needed: blocks of a request when it is let in.
        held: blocks of a request once its prompt's step is done.
        kv_share: bytes that a request then holds, of what it holds unpruned.
        running: requests in flight.
    """

    groups: int
    blocks: int
    needed: int
    held: int
    kv_share: float
    running: int


@dataclass(frozen=True)
class Seen:
    """What the engine did.

    Attributes:
        prompt_tokens: of a prompt.
        running: most requests in flight after a step.
        held: blocks out of the pool, over the requests in flight then.
        lost: blocks that did not return.
    """

    prompt_tokens: int
    running: int
    held: float
    lost: int


def arms(layers: int) -> list[Arm]:
    """Unpruned, halves of the visual tokens at one, two and three prune layers, and a gate at the middle."""
    found = [Arm("vLLM, unpruned")]
    for borders in (1, 2, 3):
        edges = [round(layers * n / (borders + 1)) for n in range(1, borders + 1)]
        text = ",".join(f"{layer}:vision={0.5**power:g}" for power, layer in enumerate(edges, start=1))
        found.append(Arm(f"{borders} prune layer{'s' if borders > 1 else ''}", text))
    return [*found, Arm("a gate that fires", f"{layers // 2}:vision=1", gate=True)]


def counted(arm: Arm, layers: int, page: int, cache: int, text: int, visual: int) -> Counts:
    """What follows from the counts.

    Args:
        arm: the schedule.
        layers: decoder layers.
        page: bytes of a block in one layer.
        cache: bytes of the KV cache.
        text: text tokens of a prompt.
        visual: its vision tokens.
    """
    whole = text + visual
    schedule = parse(arm.prune_layers) if arm.prune_layers else ()
    sizes = band_sizes(layers, [prune_layer.layer for prune_layer in schedule])
    groups, empty = band_groups(sizes)
    if empty:
        raise LoadTestError(f"{arm.prune_layers} leaves part of the cache empty: choose another model.")
    wide = layers // sum(groups)
    blocks = cache // (wide * page) - 1  # block 0 is never given out
    kept = [whole, *tokens_kept(whole, visual, text, schedule)]
    needed = _blocks(groups, kept)
    held = _blocks(groups, [whole, text]) if arm.gate else needed
    running = 0
    # a gate returns what a prompt does not need after its step, and that lets others in
    while more := (blocks - running * held) // needed:
        running += more
    share = held * wide / (layers * _blocks([1], [whole]))
    return Counts(sum(groups), blocks, needed, held, share, running)


def _blocks(groups: Sequence[int], tokens: Sequence[int]) -> int:
    return sum(count * -(-kept // BLOCK) for count, kept in zip(groups, tokens, strict=True))


def serve(pipe: Connection, model: BenchModel, arm: Arm, gate: str, blocks: int) -> None:
    """The engine's process: sends a `Seen`.

    Args:
        pipe: to the measuring process.
        model: what is served.
        arm: its schedule.
        gate: the gate's file.
        blocks: of its cache.
    """
    os.environ["VLLM_PLUGINS"] = "vtprune" if arm.prune_layers else ""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # to read the block pool
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from PIL import Image
    from vllm import LLM, SamplingParams

    from vllm_vtprune import engine_kwargs, request_kwargs

    policy = {"prune_layers": arm.prune_layers, **({"prune_gate": gate} if arm.gate else {})}
    llm = LLM(
        str(model.folder),
        dtype="float32",
        enforce_eager=True,
        block_size=BLOCK,
        num_gpu_blocks_override=blocks + 1,
        max_num_seqs=_MOST,
        max_model_len=_LONGEST,
        max_num_batched_tokens=_MOST * _LONGEST,
        enable_prefix_caching=False,
        **(engine_kwargs(**policy) if arm.prune_layers else {}),
    )
    extra_args = request_kwargs(kv_keep=AS_SCHEDULED.keep)[1] if arm.prune_layers else None
    params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True, extra_args=extra_args)
    tokens = llm.get_tokenizer()(QUESTION, add_special_tokens=False).input_ids
    generator = np.random.default_rng(0)
    for number in range(_MOST):
        image = Image.fromarray(generator.integers(0, 255, (336, 336, 3), dtype=np.uint8))
        prompt: Any = {"prompt_token_ids": tokens, "multi_modal_data": {"image": image}}
        llm.llm_engine.add_request(str(number), prompt, params)
    core: Any = llm.llm_engine.engine_core
    scheduler = core.engine_core.scheduler
    pool, free = scheduler.kv_cache_manager.block_pool, blocks
    length = next(iter(scheduler.requests.values())).num_prompt_tokens
    running, held = 0, 0.0
    # those that were let in first end after so many steps
    for _ in range(OUTPUT - 1):
        llm.llm_engine.step()
        if len(scheduler.running) > running:
            running = len(scheduler.running)
            held = (free - pool.get_num_free_blocks()) / running
    llm.llm_engine.abort_request([str(number) for number in range(_MOST)])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    pipe.send(Seen(length, running, held, free - pool.get_num_free_blocks()))


@contextlib.contextmanager
def always_firing_gate(model: BenchModel, layer: int, layers: int, hidden: int) -> Iterator[str]:
    """The file of a gate whose logit of leaving is x (2 P(x) - 1), which is never negative."""
    import torch

    from vllm_vtprune.kv_drop.gate import Gate, GateFacts, save

    direction = torch.randn(2 * hidden, generator=torch.Generator().manual_seed(0))
    gate = Gate(torch.stack([direction, -direction]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "always.gate"
        save(path, gate, GateFacts(layer, layers, hidden, fingerprint(str(model.folder))), {})
        yield str(path)


def measure(model: BenchModel, arm: Arm, gate: str, blocks: int) -> Seen:
    """Run an arm's engine in a process of its own."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=serve, args=(far, model, arm, gate, blocks), daemon=True)
    process.start()
    far.close()
    try:
        seen: Seen = near.recv()
    except EOFError:
        raise LoadTestError(f"The engine of {arm.name} ended before it had measured.") from None
    process.join(60)
    return seen


def table(results: Sequence[tuple[Arm, Counts, Seen]]) -> str:
    """A line for each arm: predicted and measured."""
    rows = [
        [
            arm.name,
            arm.prune_layers or "-",
            str(counts.groups),
            f"{100 * counts.kv_share:.1f} %",
            f"{counts.held} / {seen.held:g}",
            f"{counts.running} / {seen.running}",
        ]
        for arm, counts, seen in results
    ]
    header = ["arm", "prune layers", "KV-cache groups", "KV bytes", "blocks of a request", "in flight"]
    lines = columns(header, rows, width=_WIDTH)
    return "\n".join(
        [*lines, "KV bytes are a request's, of the unpruned one's; two numbers are predicted / seen"]
    )


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.capacity") -> int:
    """Run the command; gives the exit status."""
    return command(prog, lambda: _run(argv, prog))


def _run(argv: Sequence[str] | None, prog: str) -> None:
    parser = bench_parser(prog, "Requests in flight at a fixed KV cache, predicted from counts and measured.")
    parser.add_argument("--model", default="twelve-layers", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--mib", type=int, default=320, help="the KV cache, MiB; default: %(default)s")
    options = parser.parse_args(argv)
    model = model_named(options.model, options.model_dir)
    shape = CostShape.of(model.folder)
    page = 2 * BLOCK * shape.kv_width * 4
    where = machine.describe()
    print(machine.one_line(where))
    results = []
    middle = shape.layers // 2
    with always_firing_gate(model, middle, shape.layers, shape.hidden) as gate:
        for arm in arms(shape.layers):
            text = _text_tokens(model)
            counts = counted(arm, shape.layers, page, options.mib << 20, text, shape.patches)
            if counts.running > _MOST:
                raise LoadTestError(f"--mib {options.mib} fits more than {_MOST} requests: give less.")
            seen = measure(model, arm, gate, counts.blocks)
            if seen.prompt_tokens != text + shape.patches:
                raise LoadTestError(f"A prompt has {seen.prompt_tokens} tokens, not as many as was counted.")
            results.append((arm, counts, seen))
            print(f"{arm.name}: {counts.running} predicted, {seen.running} in flight", flush=True)
    print(table(results))
    arguments = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
    }
    rows = [
        {"arm": asdict(arm), "predicted": asdict(counts), "seen": asdict(seen)}
        for arm, counts, seen in results
    ]
    write_json(options.json, {"machine": where, "arguments": arguments, "arms": rows})


def _text_tokens(model: BenchModel) -> int:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model.folder)(QUESTION, add_special_tokens=False).input_ids
    return len(ids) - 1  # the picture's place


if __name__ == "__main__":
    sys.exit(main())
