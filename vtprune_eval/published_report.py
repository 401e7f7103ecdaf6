# SPDX-License-Identifier: Apache-2.0
"""The report of `vtprune eval --tasks`: a page and a plot of what `published.run_tasks` gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vtprune_eval.plots import bare, plotted
from vtprune_eval.published import DOWNSCALE, LMMS_EVAL, OFF, RANDOM
from vtprune_eval.tables import markdown, percent


def page(document: dict[str, Any]) -> str:
    """The report: a table for each task, each arm beside the unpruned one."""
    limit = "" if document["limit"] is None else f" The first {document['limit']} questions of each task."
    versions = document["versions"]
    parts = [
        f"# {document['model']} on published benchmarks",
        f"By `vtprune eval --tasks` with {LMMS_EVAL}, vtprune {versions['vtprune']} on vLLM "
        f"{versions['vllm']}.{limit} `±` is the tool's own standard error; `of off` is the share of the "
        "unpruned score. Compare arms of this page with each other, never with a published number.",
    ]
    for task in dict.fromkeys(row["task"] for row in document["rows"]):
        parts += [f"## {task}", _table([row for row in document["rows"] if row["task"] == task])]
    parts += [f"- {note}" for note in document["notes"]]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0]["metrics"])
    whole = rows[0]["metrics"]
    lines = []
    for row in rows:
        cells = [row["arm"], percent(row["share_kept"]), str(row["traffic"]["answered"])]
        for name in names:
            metric = row["metrics"].get(name)
            if metric is None:
                cells += ["–", "–"]
                continue
            error = "" if metric["error"] is None else f" ± {metric['error']:.3g}"
            base = whole[name]["value"]
            cells += [f"{metric['value']:.4g}{error}", percent(metric["value"] / base if base else None)]
        lines.append(cells)
    header = ["arm", "vision tokens kept", "answers"]
    return markdown([*header, *(cell for name in names for cell in (name, "of off"))], lines)


def plot(document: dict[str, Any], path: Path) -> Path:
    """Each task's first metric against the share of the vision tokens kept, a point for each arm."""
    tasks = list(dict.fromkeys(row["task"] for row in document["rows"]))
    with plotted(path, 1, len(tasks), figsize=(4.6 * len(tasks), 4), squeeze=False) as (_, axes):
        for axis, task in zip(axes[0], tasks, strict=True):
            rows = [row for row in document["rows"] if row["task"] == task]
            metric = next(iter(rows[0]["metrics"]))
            axis.axhline(rows[0]["metrics"][metric]["value"], color="black", linewidth=1)
            for row in rows:
                entry = row["metrics"].get(metric)
                if entry is None:
                    continue
                rule = row["arm"].rpartition("-")[2]
                colour, marker = {
                    RANDOM: ("#555555", "s"),
                    DOWNSCALE: ("#2a9d8f", "^"),
                    OFF: ("black", "D"),
                }.get(rule, ("#c1121f", "o"))
                axis.errorbar(
                    100 * row["share_kept"],
                    entry["value"],
                    entry["error"],
                    fmt=marker,
                    color=colour,
                    capsize=3,
                )
                axis.annotate(
                    row["arm"],
                    (100 * row["share_kept"], entry["value"]),
                    fontsize=8,
                    xytext=(5, 4),
                    textcoords="offset points",
                )
            axis.set_title(task)
            axis.set_xlabel("vision tokens kept (%)")
            axis.set_ylabel(metric)
            bare(axis)
    return path
