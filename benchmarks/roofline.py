# SPDX-License-Identifier: Apache-2.0
"""How much faster pruning could make a request at best, and how much of that was measured.

    python -m benchmarks.roofline results.json        # results of `python -m benchmarks.compare --json`

The bound: each phase (tower, projector, prefill, decode) takes at least its operations over the machine's
peak or its bytes over the memory's bandwidth, whichever is longer (Williams, Waterman and Patterson 2009,
"Roofline"). Peak and bandwidth are measured here with a large matrix product and a large copy. The bound on
speed-up is the ratio of those times, unpruned over pruned: what a server reaches when all of its kernels are
equally close to the roofline. HTTP, image decoding, tokenisation and scheduling are not in it and keep it
below; attention over long prompts, further from the roofline than matrix products are, can carry it beyond.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.commands import bench_parser, write_json
from benchmarks.models import BenchModel, model_named
from benchmarks.rounds import decimal
from vllm_vtprune.kv_drop.schedule import resolve
from vllm_vtprune.kv_drop.shares import tokens_kept
from vtprune_eval.flops import CostShape, RequestShape, Work, as_dict, request_work
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import command
from vtprune_loadtest.errors import LoadTestError

_MATMUL = 2048
_COPY_BYTES = 512 * 2**20
_REPEATS = 7
_WIDTH = 120


@dataclass(frozen=True)
class MachineLimits:
    """What the machine can do at best, in operations and bytes per second."""

    peak_flops: float
    bandwidth: float


def measure_machine() -> MachineLimits:
    """The best of a few large matrix products and copies: float32, or bfloat16 on an accelerator."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device.type == "cpu"
    size = _MATMUL if on_cpu else 4 * _MATMUL
    a = torch.randn(size, size, device=device, dtype=torch.float32 if on_cpu else torch.bfloat16)
    b = torch.empty_like(a)
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_s = _best(lambda: torch.matmul(a, a, out=b), device.type)
    copy_s = _best(lambda: target.copy_(source), device.type)
    return MachineLimits(2 * size**3 / product_s, 2 * _COPY_BYTES / copy_s)


def bound(
    shape: CostShape, full: RequestShape, pruned: RequestShape, machine: MachineLimits, batch: int
) -> float:
    """The most that a pruned request can be faster than a full one, as a ratio of times."""
    return total_seconds(request_work(shape, full, batch), machine) / total_seconds(
        request_work(shape, pruned, batch), machine
    )


def total_seconds(work: Mapping[str, Work], machine: MachineLimits) -> float:
    """The least time of a request: its phases one after another."""
    return sum(phase.seconds(machine.peak_flops, machine.bandwidth) for phase in work.values())


def report(
    model: BenchModel, results: Mapping[str, Any], traffic: Mapping[str, Any], machine: MachineLimits
) -> dict[str, Any]:
    """Bounds and shares for every arm of one model's results at every concurrency; prints a table.

    Args:
        model: the one that was measured.
        results: what `compare.compare` returned.
        traffic: the requests' fields (`interleaved.TrafficSpec`).
        machine: from `measure_machine`.
    """
    rows = []
    found: dict[str, Any] = {}
    for concurrency, point in results.items():
        arms = point["arms"]
        base_label, base = next(iter(arms.items()))
        images, output = traffic["images"], traffic["output_len"]
        shape = CostShape.of(model.folder, _unpruned(arms, images))
        text = round(base["median"]["prompt_tokens"] - images * shape.patches)
        full = RequestShape(images, text, shape.patches, output)
        found[concurrency] = {}
        for label, arm in arms.items():
            pruned = _request(arm["median"], full, model.prune_layer, label, shape.layers)
            work = request_work(shape, pruned, int(concurrency))
            limit = bound(shape, full, pruned, machine, int(concurrency))
            measured = arm["ratio"]["requests_per_s"]["median"] if label != base_label else 1.0
            gain = (measured - 1) / (limit - 1) if limit > 1.01 else None
            found[concurrency][label] = {
                "work": as_dict(work),
                "least_seconds": total_seconds(work, machine),
                "bound": limit,
                "measured": measured,
                "share": measured / limit,
                "share_of_gain": gain,
            }
            gflop = [phase.flops / 1e9 for phase in work.values()]
            rows.append(
                [
                    concurrency,
                    label,
                    *(decimal(phase, digits) for phase, digits in zip(gflop, (2, 2, 1, 2), strict=True)),
                    f"{limit:.2f}x",
                    f"{measured:.2f}x",
                    f"{measured / limit:.0%}",
                    "" if gain is None else f"{gain:.0%}",
                ]
            )
    header = ["concurrency", "arm", "GFLOP: tower", "projector", "prefill", "decode"]
    header += ["bound", "measured", "share", "of the gain"]
    print(
        f"\n{model.name}: bound on throughput at {machine.peak_flops / 1e9:.0f} GFLOP/s and "
        f"{machine.bandwidth / 1e9:.1f} GB/s",
        *columns(header, rows, left=2, width=_WIDTH),
        sep="\n",
    )
    return found


def _unpruned(arms: Mapping[str, Any], images: int) -> int | None:
    """Vision tokens of a picture, as an arm that drops none was given them; None where there is none."""
    given = arms.get("off", {}).get("median", {}).get("vision_tokens_kept")
    return None if given is None else round(given / images)


def _request(
    median: Mapping[str, Any], full: RequestShape, prune_layer: int, label: str, layers: int
) -> RequestShape:
    kept = median["vision_tokens_kept"]
    below = replace(full, kept=full.kept if kept is None else kept / full.images)
    _, _, schedule = label.partition("@")
    if schedule:
        # what leaves is a function of the counts: the text stays, as named schedules count visual tokens
        prune_layers = resolve(schedule, layers).prune_layers
        visual = round(below.images * below.kept)
        tokens = tokens_kept(below.text_tokens + visual, visual, below.text_tokens, prune_layers)
        above = zip((p.layer for p in prune_layers), tokens, strict=True)
        return replace(below, bands=tuple(above))
    return replace(below, bands=((prune_layer, median["kv_tokens_kept"]),)) if "kv" in label else below


def _best(run: Callable[[], object], device: str) -> float:
    import torch

    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.roofline") -> int:
    """Read compare's results and print bounds and shares; gives the exit status."""
    return command(prog, lambda: _run(argv, prog))


def _run(argv: Sequence[str] | None, prog: str) -> None:
    parser = bench_parser(prog, "The bound on speed-up, and the share measured.")
    parser.add_argument("results", type=Path, help="JSON written by benchmarks.compare")
    parser.add_argument("--peak-gflops", type=float, help="default: measured now; do it on an idle machine")
    parser.add_argument("--bandwidth-gbs", type=float, help="default: measured now")
    options = parser.parse_args(argv)
    try:
        document = json.loads(options.results.read_text())
        models = {name: model_named(name, options.model_dir) for name in document["models"]}
    except (OSError, ValueError, KeyError, LoadTestError) as error:
        raise LoadTestError(f"{options.results} cannot be used: {error}") from None
    machine = measure_machine()
    machine = MachineLimits(
        options.peak_gflops * 1e9 if options.peak_gflops else machine.peak_flops,
        options.bandwidth_gbs * 1e9 if options.bandwidth_gbs else machine.bandwidth,
    )
    found = {
        name: report(model, document["models"][name], document["traffic"], machine)
        for name, model in models.items()
    }
    limits = {"peak_gflops": machine.peak_flops / 1e9, "bandwidth_gbs": machine.bandwidth / 1e9}
    write_json(options.json, {"machine": limits, "models": found})


if __name__ == "__main__":
    sys.exit(main())
