# SPDX-License-Identifier: Apache-2.0
"""What dropping prompt tokens from the KV cache gains, without a server around it.

    python -m benchmarks.kv_drop                     # decoder-150m, kv_keep 1, 0.5, 0.25, three rounds
    python -m benchmarks.kv_drop --rounds 5 --keep 1,0.5 --json out.json
    python -m benchmarks.kv_drop --borders 1,2,3 --rounds 6    # as many prune layers, at equal FLOPs
    python -m benchmarks.kv_drop --against ../before --rounds 8    # beside another checkout's plugin

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
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from benchmarks import machine
from benchmarks.bands import equal_cost, prefill_flops
from benchmarks.commands import bench_parser, write_json
from benchmarks.interleaved import REST_S
from benchmarks.kv_drop_engine import EngineSample, serve
from benchmarks.models import MODELS, BenchModel, model_named
from benchmarks.rounds import Rounds, decimal, shuffled
from vllm_vtprune.kv_drop.schedule import MOST_PRUNE_LAYERS, PruneLayer
from vtprune_eval.flops import CostShape
from vtprune_eval.setting import AS_SCHEDULED
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import command
from vtprune_loadtest.errors import LoadTestError

PLAIN = "vllm"
#: Ends the label of another checkout's arm.
BEFORE = ", other checkout"
_WIDTH = 140
#: Of `QUESTION` in the byte tokens of the benchmark's models, the picture aside.
_TEXT_TOKENS = 67


@dataclass(frozen=True)
class Arm:
    """What is measured: an engine, and how much its requests keep.

    Attributes:
        prune_layers: as an operator writes them; empty for vLLM without the plugin.
        keep: `kv_keep` of its requests.
        checkout: the folder of another checkout whose plugin runs; empty for this one.
    """

    prune_layers: str
    keep: float
    checkout: str = ""


def arms(model: BenchModel, shares: Sequence[float], against: str = "") -> dict[str, Arm]:
    """By label, at the model's own prune layer; with another checkout's beside each."""
    own = str(model.prune_layer)
    compared = {PLAIN: Arm("", 1.0)}
    for share in shares:
        compared[f"kv_keep {share:g}"] = Arm(own, share)
        if against:
            compared[f"kv_keep {share:g}{BEFORE}"] = Arm(own, share, against)
    return compared


def arms_by_borders(model: BenchModel, numbers: Sequence[int]) -> dict[str, Arm]:
    """By label: so many prune layers at equal FLOPs, and with nothing dropped."""
    shape = CostShape.of(model.folder)
    text = _TEXT_TOKENS
    half = (PruneLayer(model.prune_layer, 0.5, "vision"),)
    budget = prefill_flops(shape, text, shape.patches, half)
    compared = {PLAIN: Arm("", 1.0)}
    for number in numbers:
        layers = ",".join(map(str, equal_cost(shape, text, shape.patches, number, budget)))
        compared[f"{number}: {layers}"] = Arm(layers, AS_SCHEDULED.keep)
        compared[f"{number}: nothing dropped"] = Arm(layers, 1.0)
    return compared


@contextlib.contextmanager
def engines(
    model: BenchModel, compared: Iterable[Arm], batch: int, output: int, eager: bool
) -> Iterator[Callable[[Arm, int], EngineSample]]:
    """An engine for each checkout and schedule, started one by one, as one function of (arm, seed)."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[tuple[str, str], Connection] = {}
    processes = []
    for checkout, prune_layers in dict.fromkeys((arm.checkout, arm.prune_layers) for arm in compared):
        pipe, far = context.Pipe()
        # what every release of the plugin understands, where it can be said so
        policy = {"prune_layer": int(prune_layers)} if checkout else {"prune_layers": prune_layers}
        arguments = (far, str(model.folder), policy if prune_layers else {}, checkout)
        limits = (model.kv_cache_gb or 4, batch, output, eager)
        process = context.Process(target=serve, args=(*arguments, *limits), daemon=True)
        process.start()
        far.close()
        processes.append(process)
        pipe.recv()
        pipes[checkout, prune_layers] = pipe

    def measured(arm: Arm, seed: int) -> EngineSample:
        # the last engine's worker still polls, on a core of this one's
        time.sleep(REST_S)
        pipe = pipes[arm.checkout, arm.prune_layers]
        pipe.send((arm.keep, seed))
        sample: EngineSample = pipe.recv()
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
        rows.append(
            [
                label,
                decimal(rounds.median(label, "kv_mib"), 2),
                decimal(rounds.median(label, "ttft_s"), 3),
                decimal(1000 * (rounds.median(label, "step_s") or math.nan), 2),
                decimal(rounds.median(label, "tokens_per_s"), 1),
                *_ratios(rounds, label),
            ]
        )
    interval = rounds.spread(PLAIN, "ttft_s").interval
    header = ["arm", "KV MiB", "TTFT s", "step ms", "tokens/s", f"TTFT ratio ({interval})", "step ratio"]
    header.append("throughput ratio")
    return "\n".join(columns(header, rows, width=_WIDTH))


def table_against(rounds: Rounds[EngineSample]) -> str:
    """This checkout's arms over the other one's, within each round."""
    rows = []
    for label in rounds.labels:
        if label + BEFORE in rounds.labels:
            pair: Rounds[EngineSample] = Rounds([label + BEFORE, label])
            pair.blocks = {name: rounds.blocks[name] for name in pair.labels}
            rows.append([label, *_ratios(pair, label)])
            interval = pair.spread(label, "ttft_s").interval
    header = ["to the other checkout", f"TTFT ratio ({interval})", "step ratio", "throughput ratio"]
    return "\n".join(columns(header, rows, width=_WIDTH))


def _ratios(rounds: Rounds[EngineSample], label: str) -> list[str]:
    ratios = [rounds.spread(label, name) for name in ("ttft_s", "step_s", "tokens_per_s")]
    return [f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})" for ratio in ratios]


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
    parser.add_argument(
        "--against", type=Path, help="another checkout of this repository: its plugin is measured in turns"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="requests at once")
    parser.add_argument("--output", type=int, default=16, help="output tokens per request")
    parser.add_argument("--compile", action="store_true", help="torch.compile instead of eager execution")
    options = parser.parse_args(argv)
    model = model_named(options.model, options.model_dir)
    if options.against and not (options.against / "vllm_vtprune").is_dir():
        raise LoadTestError(f"--against must be a checkout of vtprune, and {options.against} is none.")
    if options.borders and options.against:
        raise LoadTestError("--against compares engines with one prune layer: leave out --borders.")
    if options.borders:
        compared = arms_by_borders(model, _numbers(options.borders))
    else:
        other = str(options.against.resolve()) if options.against else ""
        compared = arms(model, [float(share) for share in options.keep.split(",")], other)
    where = machine.describe()
    print(machine.one_line(where))
    print(f"{options.model}: {options.batch} requests at once, {options.output} output tokens each")
    rounds: Rounds[EngineSample] = Rounds(list(compared))
    rng = np.random.default_rng(0)
    eager = not options.compile
    with engines(model, compared.values(), options.batch, options.output, eager) as measured:
        for number in range(options.rounds):
            for label in shuffled(list(compared), rng):
                rounds.blocks[label].append(measured(compared[label], number))
            print(f"round {number + 1} of {options.rounds} done", flush=True)
    print(table(rounds))
    if options.against:
        print(table_against(rounds))
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
