# SPDX-License-Identifier: Apache-2.0
"""The comparison in docs/schedules: `vtprune calibrate --study --out docs/schedules`.

One prune layer, the named schedules and calibrated ones on questions that decided nothing, each with random
dropping at the same counts beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_vtprune.kv_drop.schedule import NAMED, PruneLayer, band_groups, band_sizes
from vtprune_calibrate.arguments import Budget
from vtprune_calibrate.comparison import compare, one_border, table
from vtprune_calibrate.document import facts_of_run
from vtprune_calibrate.gate import TRIALS, gate_table, gates_of
from vtprune_calibrate.plots import plot_costs
from vtprune_calibrate.run import Calibration
from vtprune_eval.report import dump
from vtprune_eval.tables import Row, markdown

#: What is calibrated for: a share of the answers, or of the unpruned prompt's FLOPs.
TOLERANCE, BUDGETS = 0.01, (0.8, 0.7, 0.6)
#: Shares of the visual tokens above the single prune layer.
ALONE = (0.5, 0.25, 0.125)


def run_study(
    calibration: Calibration, prune_layer: int, bands: int, say: Callable[[str], None]
) -> list[Path]:
    """Calibrate, compare, and write results.json, results.md and the plot; returns their paths."""
    layers, trials = calibration.shape.layers, calibration.confirm
    searched: dict[str, Any] = {}
    schedules: dict[str, tuple[tuple[PruneLayer, ...], str | None]] = {
        f"one, layer {prune_layer}, {share:g}": ((PruneLayer(prune_layer, share, "vision"),), None)
        for share in ALONE
    }
    for name, make in NAMED.items():
        named = make(layers)
        schedules[name] = named.prune_layers, ",".join(named.relevance) if named.relevance else None
    wanted: dict[str, float | Budget] = {f"calibrated, {TOLERANCE:g} tolerance": TOLERANCE}
    wanted |= {f"calibrated, flops={share:g}": Budget("flops", share) for share in BUDGETS}
    for name, goal in wanted.items():
        found, searched[name] = calibration.find(goal, bands)
        schedules[name] = found.schedule, None

    costs = calibration.costs_held_out
    calibration.bar.expect(1 + 4 * len(schedules), "comparing")
    unpruned = compare(trials, costs, "unpruned", ())
    rows = [
        compare(trials, costs, name, schedule, relevance) for name, (schedule, relevance) in schedules.items()
    ]
    borders = calibration.few_borders()
    calibration.bar.expect(5 * len(borders), "single prune layers")
    alone = one_border(trials, costs, borders)
    calibration.bar.expect(TRIALS * len(borders), "gates")
    gates = [row for row, _ in gates_of(calibration, borders)]
    calibration.bar.close()
    result = {
        **facts_of_run(calibration.facts),
        "kendall_tau": calibration.kendall_tau(),
        "searches": searched,
        "unpruned": unpruned,
        "rows": rows,
        "one_prune_layer": alone,
        "gates": gates,
    }
    say(table([unpruned, *rows]))
    folder = calibration.folder
    path = folder / "results.json"
    path.write_text(dump(result), encoding="utf-8")
    facts: Any = calibration.facts
    title = f"{facts['model']['name']}: {facts['data']['held_out']} test questions"
    plotted = [row for row in rows if not row["name"].startswith("one,")]
    plot = plot_costs(unpruned, alone, plotted, title, folder / "costs.png")
    return [path, _page(result, layers, folder / "results.md"), plot]


def _page(result: dict[str, Any], layers: int, path: Path) -> Path:
    rows, unpruned = result["rows"], result["unpruned"]
    data, model = result["data"], result["model"]
    parts = [
        "# Schedules compared",
        f"Made by `vtprune calibrate --study` on {result['date']}, model `{model['name']}` (weights "
        f"{model['weights']}). {data['questions']} questions decided, these {data['held_out']} others were "
        "asked afterwards. FLOPs (of the decoder's prefill and of the ratings) and KV bytes are shares of "
        "the unpruned prompts'. Brackets are 95 % confidence intervals (bootstrap over pictures; differences "
        "are paired, in percentage points); a star marks a difference whose interval excludes 0. Random "
        "dropping has the same counts at every prune layer, the mean of three draws; an exit leaves nothing "
        "to choose.",
        "![answers against costs](costs.png)",
        table([unpruned, *rows]),
        "## KV-cache groups",
        "Each group costs a block table and a metadata build per step; what lies empty is cache that a "
        "schedule wastes.",
        _groups(rows, layers),
        "## Single prune layers",
        table([unpruned, *result["one_prune_layer"]]),
        "## A gate that decides for each question",
        "DyVTE (arXiv 2411.19628) trains a gate that says, question by question, whether all visual tokens "
        "may leave. Trained here on the questions that decided, for one exit at a time, as "
        "`vtprune calibrate --gate` does. `answer survives`: how often the exit leaves the unpruned answer; "
        "`right to`: how often it does where the gate fires; chance fires as often, without looking; a share "
        "is one of every prompt's visual tokens that costs as much at the same prune layer.",
        gate_table(result["gates"]),
        "## How alike the layers rank the visual tokens",
        "Kendall's tau-b between prune layers, mean over prompts:",
        _tau(result["kendall_tau"]),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _groups(rows: list[Row], layers: int) -> str:
    lines = []
    for row in rows:
        edges = [int(part.partition(":")[0]) for part in row["schedule"].split(",")]
        groups, empty = band_groups(band_sizes(layers, edges))
        lines.append([row["name"], str(sum(groups)), f"{100 * empty / (1 + empty):.0f} %"])
    return markdown(["schedule", "KV-cache groups", "empty"], lines)


def _tau(tau: list[list[float]]) -> str:
    names = [str(at + 1) for at in range(len(tau))]
    return markdown(
        ["prune layer", *names],
        [[name, *(f"{value:.2f}" for value in row)] for name, row in zip(names, tau, strict=True)],
    )
