# SPDX-License-Identifier: Apache-2.0
"""One vision tower for all API processes, against one in each: memory, batch size and throughput.

    python -m benchmarks.shared_tower --model demo --api-processes 1,2,4 --concurrency 16 --seconds 120

For each number of API processes two servers run, `--vtprune-tower in-process` and `shared`, and take turns
(`benchmarks.interleaved`); ratios are paired by round. Memory is each server's proportional set size after
its last block, so that what processes share counts once; on a GPU it leaves out the device's.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from benchmarks import machine
from benchmarks.arms import Arm
from benchmarks.commands import bench_parser, write_json
from benchmarks.interleaved import LoadRounds, TrafficSpec, connected
from benchmarks.models import BenchModel, model_named
from benchmarks.rounds import decimal, finite, quartiles
from benchmarks.servers import RunningServer, ServerSpec, running, sum_in
from vllm_vtprune.contract import HEADERS
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import command
from vtprune_loadtest.errors import LoadTestError

TOWERS = ("in-process", "shared")


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.shared_tower") -> int:
    """Compare; gives the exit status."""
    return command(prog, lambda: _run(list(sys.argv[1:] if argv is None else argv), prog))


def _run(arguments: list[str], prog: str) -> None:
    parser = bench_parser(prog, "Compare a shared vision tower with one in each API process.")
    parser.add_argument(
        "--model", default="demo", help="demo, decoder-150m, llava-1.5-7b; default: %(default)s"
    )
    parser.add_argument("--api-processes", default="1,2,4", metavar="N[,N]")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=120.0, help="per number of API processes")
    parser.add_argument("--rounds", type=int, help="at most so many rounds")
    parser.add_argument("--output-len", type=int, default=16, help="tokens per answer; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the servers' logs")
    options = parser.parse_args(arguments)
    counts = [_positive(part) for part in options.api_processes.split(",")]
    traffic = TrafficSpec(output_len=options.output_len, seed=options.seed)
    model = model_named(options.model, options.model_dir)
    found: dict[str, Any] = {"machine": machine.describe(), "model": model.name, "api_processes": {}}
    with tempfile.TemporaryDirectory(prefix="vtprune-logs-") as scratch:
        for count in counts:
            part = compare(
                model,
                count,
                traffic,
                options.concurrency,
                seconds=options.seconds,
                max_rounds=options.rounds,
                logs=options.logs or Path(scratch),
            )
            found["api_processes"][str(count)] = part
            print(table(model.name, count, options.concurrency, part), flush=True)
    write_json(options.json, found)


def compare(
    model: BenchModel,
    count: int,
    traffic: TrafficSpec,
    concurrency: int,
    *,
    seconds: float,
    max_rounds: int | None,
    logs: Path,
) -> dict[str, Any]:
    """Both towers with so many API processes: per arm medians, ratios, memory and mean batch."""
    arms = [Arm(tower, tower, ((HEADERS["keep_ratio"], "0.22"),)) for tower in TOWERS]

    async def measure(servers: list[RunningServer]) -> dict[str, Any]:
        async with connected(arms, servers, model.name, traffic) as comparison:
            before = {server.spec.name: await tower_passes(server) for server in servers}
            rounds = await comparison.run(concurrency, seconds=seconds, max_rounds=max_rounds)
            result: dict[str, Any] = {"rounds": len(rounds), "requests_per_block": rounds.requests_per_block}
            for server in servers:
                name = server.spec.name
                images, passes = (
                    now - then for now, then in zip(await tower_passes(server), before[name], strict=True)
                )
                result[name] = {
                    **_arm(rounds, name),
                    "batch": images / passes if passes else None,
                    "memory_mib": memory_mib(server),
                }
            return result

    with running(specs(count), model, logs) as servers:
        return asyncio.run(measure(servers))


def specs(count: int) -> list[ServerSpec]:
    """The two servers, each with so many API processes."""
    flags = ("--api-server-count", str(count), "--vtprune-tower")
    return [ServerSpec(tower, plugin=True, flags=(*flags, tower)) for tower in TOWERS]


async def tower_passes(server: RunningServer) -> tuple[float, float]:
    """Images that its towers have seen so far, and in how many passes."""
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        text = (await client.get(f"{server.url}/metrics")).text
    name = "vtprune_tower_batch_size"
    return sum_in(text, f"{name}_sum"), sum_in(text, f"{name}_count")


def memory_mib(server: RunningServer) -> float:
    """Proportional set size of all of its processes."""
    total = 0
    for process in server.process.members():
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total / 2**20


def _arm(rounds: LoadRounds, name: str) -> dict[str, Any]:
    metrics = ("requests_per_s", "e2el_s", "cpu_s")
    return {
        "median": {metric: rounds.median(name, metric) for metric in metrics},
        "ratio": {metric: finite(asdict(rounds.spread(name, metric))) for metric in metrics},
        "shown": {metric: quartiles(rounds.spread(name, metric)) for metric in metrics},
    }


def table(title: str, count: int, concurrency: int, part: dict[str, Any]) -> str:
    """A line for each arm."""
    rows = []
    for tower in TOWERS:
        arm = part[tower]
        first = tower == TOWERS[0]
        rows.append(
            [
                tower,
                decimal(arm["memory_mib"], 0),
                decimal(arm["batch"], 1),
                decimal(arm["median"]["requests_per_s"], 2),
                decimal(arm["median"]["e2el_s"], 1, 1000),
                *("" if first else arm["shown"][metric] for metric in ("requests_per_s", "e2el_s", "cpu_s")),
            ]
        )
    header = ["tower", "MiB", "images a pass", "req/s", "e2e ms"]
    header += ["throughput ratio", "e2e ratio", "CPU time ratio"]
    head = (
        f"{title}, {count} API process{'es' if count > 1 else ''}, concurrency {concurrency}: "
        f"{part['rounds']} rounds of {part['requests_per_block']} requests; medians; ratios to "
        f"{TOWERS[0]}, paired by round"
    )
    return "\n".join(["", head, *columns(header, rows, width=140)])


def _positive(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise LoadTestError(f"--api-processes takes numbers from 1 such as 1,2,4, not {text!r}.")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
