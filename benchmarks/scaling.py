# SPDX-License-Identifier: Apache-2.0
"""How cost grows with images per prompt, patches per image, output length and concurrency.

    python -m benchmarks.scaling --json docs/benchmarks/growth.json --plot docs/benchmarks/growth.png

One axis varies, the others stay at one image, 576 patches, 16 output tokens, concurrency 1. vLLM without the
plugin and our server at 22 % of the vision tokens take turns; the decoder has 13 million parameters, so that
prompts of thousands of tokens fit into minutes on two cores.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.arms import Arm, parse_arms, servers_for
from benchmarks.commands import bench_parser, write_json
from benchmarks.interleaved import LoadRounds, TrafficSpec, connected
from benchmarks.models import default_model_dir, many_patches
from benchmarks.servers import RunningServer, running
from vtprune_loadtest.command import command

ARMS = "vllm,keep0.22"
_METRICS = {"requests_per_s": "requests/s", "ttft_s": "time to first token, s"}


@dataclass(frozen=True)
class Point:
    """One measurement: the axis it belongs to, its value there, and everything that decides the cost."""

    axis: str
    value: int
    images: int = 1
    patches: int = 576
    output_len: int = 16
    concurrency: int = 1


POINTS = (
    *(Point("images per prompt", n, images=n) for n in (1, 2, 4, 8)),
    *(Point("patches per image", n, patches=n) for n in (144, 576, 1024)),
    *(Point("output tokens", n, output_len=n) for n in (1, 16, 64)),
    *(Point("concurrency", n, concurrency=n) for n in (1, 4, 16)),
)


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.scaling") -> int:
    """Measure every point; gives the exit status."""
    return command(prog, lambda: _run(argv, prog))


def _run(argv: Sequence[str] | None, prog: str) -> None:
    parser = bench_parser(prog, "How cost grows, pruned and unpruned.")
    parser.add_argument("--seconds", type=float, default=20.0, help="per point; three rounds at least")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG; needs matplotlib")
    options = parser.parse_args(argv)
    document: dict[str, Any] = {"command": prog, "machine": machine.describe(), "arms": ARMS, "points": []}
    print(machine.one_line(document["machine"]))
    for patches in sorted({point.patches for point in POINTS}):
        document["points"] += measure(patches, options.seconds, options.model_dir or default_model_dir())
    document["load_average_at_end"] = machine.describe()["load_average"]
    write_json(options.json, document)
    if options.plot is not None:
        plot(document, options.plot)


def measure(patches: int, seconds: float, model_dir: Path) -> list[dict[str, Any]]:
    """All points with this many patches, on one pair of servers; prints a line for each."""
    model, arms = many_patches(model_dir, patches), parse_arms(ARMS)
    lines = []
    with (
        tempfile.TemporaryDirectory(prefix="vtprune-logs-") as logs,
        running(servers_for(arms, model), model, Path(logs)) as servers,
    ):
        for point in POINTS:
            if point.patches == patches:
                rounds = asyncio.run(_measure(point, arms, servers, model.name, seconds))
                lines.append(_as_json(point, rounds))
                print(_line(lines[-1], arms), flush=True)
    return lines


async def _measure(
    point: Point, arms: Sequence[Arm], servers: Sequence[RunningServer], model: str, seconds: float
) -> LoadRounds:
    # a seed of its own: a picture that an earlier point sent would be in the servers' caches
    traffic = TrafficSpec(images=point.images, output_len=point.output_len, seed=POINTS.index(point))
    async with connected(arms, servers, model, traffic) as comparison:
        return await comparison.run(point.concurrency, seconds=seconds)


def _as_json(point: Point, rounds: LoadRounds) -> dict[str, Any]:
    def metric(label: str, name: str) -> dict[str, float | None]:
        spread = rounds.spread(label, name)
        ratio = {"ratio": spread.median, "ratio_q1": spread.q1, "ratio_q3": spread.q3}
        return {"median": rounds.median(label, name), **ratio}

    return {
        "axis": point.axis,
        "value": point.value,
        "rounds": len(rounds),
        "prompt_tokens": {
            label: float(rounds.values(label, "prompt_tokens").mean()) for label in rounds.labels
        },
        "arms": {label: {name: metric(label, name) for name in _METRICS} for label in rounds.labels},
    }


def _line(point: dict[str, Any], arms: Sequence[Arm]) -> str:
    base, pruned = (point["arms"][arm.label] for arm in arms[:2])
    tokens = [point["prompt_tokens"][arm.label] for arm in arms[:2]]
    throughput, first = pruned["requests_per_s"], pruned["ttft_s"]
    return (
        f"{point['axis']:<18}{point['value']:>5}  prompt {tokens[0]:>5.0f} -> {tokens[1]:>5.0f}"
        f"   req/s {base['requests_per_s']['median']:>6.2f} -> {throughput['median']:>6.2f}"
        f" ({throughput['ratio']:.2f}x [{throughput['ratio_q1']:.2f} {throughput['ratio_q3']:.2f}])"
        f"   TTFT {base['ttft_s']['median']:>6.3f} -> {first['median']:>6.3f} s ({first['ratio']:.2f}x)"
    )


def plot(document: dict[str, Any], path: Path) -> None:
    """One column per axis, throughput above time to first token."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(point.axis for point in POINTS))
    figure = Figure(figsize=(3.4 * len(axes), 5.6), layout="constrained")
    for column, axis in enumerate(axes):
        points = sorted((p for p in document["points"] if p["axis"] == axis), key=lambda p: int(p["value"]))
        values = [point["value"] for point in points]
        for row, (metric, name) in enumerate(_METRICS.items()):
            plane = figure.add_subplot(len(_METRICS), len(axes), row * len(axes) + column + 1)
            for label, title in (("vllm", "vLLM"), ("keep0.22", "22 % of the vision tokens")):
                plane.plot(values, [p["arms"][label][metric]["median"] for p in points], "o-", label=title)
            plane.set(xlabel=axis, ylabel=name, xscale="log", ylim=(0, None))
            plane.set_xticks(values, [str(value) for value in values])
            plane.minorticks_off()
            plane.grid(alpha=0.3)
    lines, titles = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, titles, fontsize="small", loc="outside lower center", ncols=2)
    figure.suptitle(machine.one_line(document["machine"]), fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
