# SPDX-License-Identifier: Apache-2.0
"""The short version of every comparison, in under ten minutes on two cores: `make bench`.

python -m benchmarks [--json FILE] [--scale 1.0]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.arms import parse_arms
from benchmarks.commands import bench_parser, write_json
from benchmarks.compare import DEFAULT_ARMS, compare
from benchmarks.interleaved import TrafficSpec
from benchmarks.models import model_named
from benchmarks.roofline import measure_machine, report
from vtprune_loadtest.command import command

_PROG = "python -m benchmarks"


@dataclass(frozen=True)
class Part:
    """One model on one set of servers.

    Attributes:
        seconds: how long to measure, by concurrency.
        only: the arms that take part, by concurrency; all where nothing is said.
    """

    model: str
    arms: str
    seconds: dict[int, float]
    only: dict[int, tuple[str, ...]] = field(default_factory=dict)


PARTS = (
    Part("demo", DEFAULT_ARMS, {1: 70.0}),
    Part(
        "decoder-150m",
        "vllm,off,a0.5,keep0.22,keep0.22+kv0.5",
        {1: 60.0, 4: 75.0, 16: 75.0},
        # an unpruned block of 16 takes most of a minute
        {16: ("vllm", "keep0.22", "keep0.22+kv0.5")},
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; gives the exit status."""
    return command(_PROG, lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> None:
    parser = bench_parser(_PROG, "Measure this machine: pruned and unpruned serving.")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the time of each part")
    options = parser.parse_args(argv)
    started = time.monotonic()
    document = run(options.scale, options.model_dir)
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes")
    write_json(options.json, document)


def run(scale: float, model_dir: Path | None) -> dict[str, Any]:
    """Measure the machine, then every part.

    Raises:
        LoadTestError: a server did not start, or a request failed.
    """
    here = machine.describe()
    print(machine.one_line(here))
    limits = measure_machine()  # first, while no server is up
    traffic = TrafficSpec()
    parts = []
    for part in PARTS:
        model = model_named(part.model, model_dir)
        results = compare(
            model,
            parse_arms(part.arms),
            {concurrency: scale * seconds for concurrency, seconds in part.seconds.items()},
            traffic,
            min_rounds=2,
            only=part.only,
        )
        bounds = report(model, results, asdict(traffic), limits)
        parts.append({"model": model.name, "results": results, "roofline": bounds})
    return {
        "command": "make bench",
        "machine": here,
        "peak_gflops": limits.peak_flops / 1e9,
        "bandwidth_gbs": limits.bandwidth / 1e9,
        "load_average_at_end": machine.describe()["load_average"],
        "traffic": asdict(traffic),
        "parts": parts,
    }


if __name__ == "__main__":
    sys.exit(main())
