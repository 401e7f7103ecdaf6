# SPDX-License-Identifier: Apache-2.0
"""vLLM without the plugin beside our server: same model, machine, flags and traffic, taking turns.

    python -m benchmarks.compare             # the demo model and decoder-150m, concurrency 1
    python -m benchmarks.compare --model decoder-150m --concurrency 4,16 --arms vllm,off,keep0.22

Ratios are to the first arm, paired within rounds of a few seconds: median and quartiles over the rounds. The
arm `off` is the plugin loaded and pruning nothing: its ratio is the plugin's overhead.
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.arms import Arm, parse_arms, servers_for
from benchmarks.commands import bench_parser, write_json
from benchmarks.interleaved import LoadRounds, TrafficSpec, connected
from benchmarks.models import MODELS, BenchModel, model_named
from benchmarks.rounds import decimal, finite, quartiles
from benchmarks.servers import RunningServer, running
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import SentenceParser, command
from vtprune_loadtest.errors import LoadTestError

DEFAULT_ARMS = "vllm,off,a0.25,a0.5,a0.75"
_WIDTH = 140
_METRICS = ("e2el_s", "ttft_s", "tpot_s", "requests_per_s", "cpu_s")


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.compare") -> int:
    """Compare; gives the exit status."""
    return command(prog, lambda: _run(list(sys.argv[1:] if argv is None else argv), prog))


def _run(arguments: list[str], prog: str) -> None:
    options = _parser(prog).parse_args(arguments)
    arms = parse_arms(options.arms)
    seconds = {_positive(text): options.seconds for text in options.concurrency.split(",")}
    traffic = TrafficSpec(output_len=options.output_len, images=options.images, seed=options.seed)
    document: dict[str, Any] = {
        "command": shlex.join([*prog.split(), *arguments]),
        "machine": machine.describe(),
        "traffic": asdict(traffic),
        "models": {},
    }
    print(machine.one_line(document["machine"]))
    for name in options.model.split(","):
        model = model_named(name.strip(), options.model_dir)

        def keep(results: dict[str, Any], name: str = model.name) -> None:
            """Written after each load point, so that an interrupted run keeps what it has."""
            document["models"][name] = results
            document["load_average_at_end"] = machine.describe()["load_average"]
            write_json(options.json, document)

        compare(model, arms, seconds, traffic, max_rounds=options.rounds, logs=options.logs, keep=keep)


def compare(
    model: BenchModel,
    arms: Sequence[Arm],
    seconds: Mapping[int, float],
    traffic: TrafficSpec,
    *,
    min_rounds: int = 3,
    max_rounds: int | None = None,
    only: Mapping[int, Collection[str]] | None = None,
    logs: Path | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measure one model at each concurrency, print a table for each.

    Args:
        model: what is served.
        arms: the first is the one that all others are compared with.
        seconds: how long to measure, by concurrency.
        traffic: what is asked.
        min_rounds: even if the time is over.
        max_rounds: even if there is time left.
        only: labels of the arms that take part, by concurrency; all where nothing is said.
        logs: folder for the servers' logs; None throws them away.
        keep: given the results so far after each concurrency.

    Returns:
        The results as JSON values, every block of every round included.

    Raises:
        LoadTestError: a server did not start, or a request failed.
    """
    results: dict[str, Any] = {}

    async def measure(servers: Sequence[RunningServer]) -> None:
        # one comparison for all load points: its pictures go on, so none comes back
        async with connected(arms, servers, model.name, traffic) as comparison:
            for concurrency, limit in seconds.items():
                measured = await comparison.run(
                    concurrency,
                    seconds=limit,
                    min_rounds=min_rounds,
                    max_rounds=max_rounds,
                    only=(only or {}).get(concurrency),
                )
                present = [arm for arm in arms if arm.label in measured.labels]
                results[str(concurrency)] = as_json(measured, present)
                print(table(model.name, measured, present), flush=True)
                keep(results)

    with (
        tempfile.TemporaryDirectory(prefix="vtprune-logs-") as scratch,
        running(servers_for(arms, model), model, logs or Path(scratch)) as servers,
    ):
        asyncio.run(measure(servers))
    return results


def as_json(measured: LoadRounds, arms: Sequence[Arm]) -> dict[str, Any]:
    """Medians of every metric, paired ratios to the first arm with their spread, and the blocks."""
    result: dict[str, Any] = {
        "rounds": len(measured),
        "requests_per_block": measured.requests_per_block,
        "arms": {},
    }
    for arm in arms:
        blocks = measured.blocks[arm.label]
        result["arms"][arm.label] = {
            "headers": dict(arm.headers),
            "median": {name: measured.median(arm.label, name) for name in asdict(blocks[0])},
            "ratio": {name: finite(asdict(measured.spread(arm.label, name))) for name in _METRICS},
            "blocks": [finite(asdict(block)) for block in blocks],
        }
    return result


def table(title: str, measured: LoadRounds, arms: Sequence[Arm]) -> str:
    """The results of one load point, a line for each arm."""
    base = measured.base
    rows = []
    for label in (arm.label for arm in arms):
        vision = measured.median(label, "vision_tokens_kept")
        ratios = ("e2el_s", "requests_per_s", "cpu_s")
        rows.append(
            [
                label,
                "all" if vision is None else f"{vision:.0f}",
                decimal(measured.median(label, "prompt_tokens"), 0),
                decimal(measured.median(label, "ttft_s"), 1, 1000),
                decimal(measured.median(label, "e2el_s"), 1, 1000),
                decimal(measured.median(label, "requests_per_s"), 2),
                decimal(measured.median(label, "tower_share"), 0, 100),
                *("" if label == base else quartiles(measured.spread(label, name)) for name in ratios),
            ]
        )
    header = ["arm", "vision", "prompt", "TTFT ms", "e2e ms", "req/s", "tower %"]
    header += ["e2e ratio", "throughput ratio", "CPU time ratio"]
    lines = [
        "",
        f"{title}, concurrency {measured.concurrency}: {len(measured)} rounds of "
        f"{measured.requests_per_block} requests per arm; medians; ratios to {base}, paired by round, with "
        "quartiles; tower %: of the time, that in which the API process's vision tower was at work",
        *columns(header, rows, width=_WIDTH),
    ]
    if base == "vllm" and "off" in measured.labels:
        lines.append(_overhead(measured))
    return "\n".join(lines)


def _overhead(measured: LoadRounds) -> str:
    spread = measured.spread("off", "e2el_s")
    return (
        f"plugin loaded and off: end-to-end latency {spread.median - 1:+.1%} "
        f"({spread.interval} {spread.low - 1:+.1%} to {spread.high - 1:+.1%})"
    )


def _positive(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise LoadTestError(f"--concurrency takes numbers from 1 such as 1,4,16, not {text!r}.")
    return int(text)


def _parser(prog: str) -> SentenceParser:
    parser = bench_parser(prog, "Compare vLLM without the plugin and our server.")
    parser.add_argument(
        "--model",
        default="demo,decoder-150m",
        help=f"{', '.join(MODELS)}, or a folder; several by comma",
    )
    parser.add_argument(
        "--arms",
        default=DEFAULT_ARMS,
        help="default: %(default)s; also keep0.22+kv0.5, downscale0.22",
    )
    parser.add_argument("--concurrency", default="1", metavar="N[,N]")
    parser.add_argument("--seconds", type=float, default=60.0, help="per load point; three rounds at least")
    parser.add_argument("--rounds", type=int, help="at most so many rounds")
    parser.add_argument("--output-len", type=int, default=16, help="tokens per answer; default: %(default)s")
    parser.add_argument("--images", type=int, default=1, help="pictures per prompt; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
