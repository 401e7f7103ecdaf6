# SPDX-License-Identifier: Apache-2.0
"""The study's tables as one Markdown page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtprune_eval.setting import BASELINES
from vtprune_eval.tables import Row, by_kind, content, interval, markdown, percent, points, summary


def write_page(result: dict[str, Any], path: Path) -> Path:
    """Write docs/evaluation/results.md from results.json's object."""
    fixed, adaptive = result["fixed"]["rows"], result["adaptive"]["rows"]
    scenes = result["scenes"]
    parts = [
        "# Results",
        f"Made by `vtprune eval --study` on {result['date']} with torch {result['torch']}, model "
        f"`{result['model']['name']}` (weights {result['model']['sha256']}). Test: {scenes['test']} scenes, "
        f"{result['fixed']['questions']['asked']} questions. Validation, for everything that was chosen: "
        f"{scenes['validation']} scenes, {scenes['deciding']} for stage 2. Brackets are 95 % confidence "
        "intervals (bootstrap over pictures; differences are paired, in percentage points); a star marks a "
        "difference whose interval excludes 0.",
        "## Unpruned, by question kind",
        by_kind(fixed[:1]),
        "## Every method at the same share of every picture",
        "Under a fixed share `inflection` keeps what `topk` keeps. `object patches`: how many of the patches "
        "that show a shape or the text stay; `objects half seen`: of how many shapes and texts at least half "
        "of the patches stay.",
        stage1(fixed),
        "## The count follows the picture",
        "The aggressiveness is calibrated on validation to the same mean shares; `random` and `uniform` keep "
        "as many tokens of each picture.",
        stage1(adaptive),
        "Correlation of the kept count with the number of shapes and of object patches, and the mean count "
        "by number of shapes:",
        content([row for row in adaptive if row["setting"]["method"] in ("unpruned", "inflection")]),
        "By question kind:",
        by_kind(adaptive),
        "## What stage 2 adds",
        "`cache` is the share of the KV-cache entries that the unpruned prompt takes over all layers; "
        "`random` drops at random at the prune layer, or picks the picture's tokens at random, at the same "
        "counts.",
        summary(result["stage2"]),
        "## What decided the defaults (validation)",
        "Mean share kept by aggressiveness:",
        _shares(result),
        f"Prune layer; chosen: {result['prune_layer']}, the smallest within two points of the best mean.",
        summary(result["deciding"]),
        "Window, relevance and scope:",
        summary(result["rating"]),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def dump(document: dict[str, Any]) -> str:
    """JSON with one line per result row, so that a change of one number is a change of one line."""
    return _written(document, "") + "\n"


def _written(value: Any, indent: str) -> str:
    """As `json.dumps(value, indent=1)` writes it, but for the objects of a list: a line each."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        entries = [f"{json.dumps(str(key))}: {_written(entry, inner)}" for key, entry in value.items()]
        opening, closing = "{}"
    elif isinstance(value, list) and value:
        rows = isinstance(value[0], dict)
        entries = [json.dumps(entry) if rows else _written(entry, inner) for entry in value]
        opening, closing = "[]"
    else:
        return json.dumps(value)
    lines = ",\n".join(inner + entry for entry in entries)
    return f"{opening}\n{lines}\n{indent}{closing}"


def stage1(rows: list[Row]) -> str:
    """Stage-1 rows: what is kept, accuracy, and the margin over the baselines."""
    return markdown(
        [
            "method",
            "asked for",
            "kept",
            "object patches",
            "objects half seen",
            "accuracy",
            "agrees",
            "over random",
            "over uniform",
            "over downscale",
        ],
        [
            [
                row["setting"]["method"] if row["versus"] else "unpruned",
                _amount(row),
                percent(row["share_kept"]),
                *(percent(row.get("objects", {}).get(name)) for name in ("patches", "half_seen")),
                interval(row["accuracy"]),
                percent(row["agreement"]["value"]),
                *(points(row["versus"].get(name, {}).get("difference")) for name in BASELINES),
            ]
            for row in rows
        ],
    )


def _amount(row: Row) -> str:
    setting = row["setting"]
    if setting["keep_ratio"] is not None:
        return f"keep_ratio {setting['keep_ratio']:g}"
    return f"aggressiveness {setting['aggressiveness']:g}" if setting["aggressiveness"] else "–"


def _shares(result: dict[str, Any]) -> str:
    shares = result["share_by_aggressiveness"]
    chosen = {f"{amount:g}": name for name, amount in result["presets"].items()}
    shown = [a for a in shares if a in chosen or round(float(a) * 100) % 10 == 0]
    return markdown(
        ["aggressiveness", "kept", "preset"],
        [[a, percent(shares[a]), chosen.get(a, "")] for a in shown],
    )
