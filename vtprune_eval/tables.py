# SPDX-License-Identifier: Apache-2.0
"""Result rows as text: aligned Markdown, so that the same table reads in a terminal and in a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; all but the first are right-aligned."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0])]
        padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def summary(document: dict[str, Any]) -> str:
    """Every row: tokens kept, accuracy, agreement, and what it gains over the baselines."""
    rows = document["rows"]
    names = sorted({name for row in rows for name in row["versus"]} - {"unpruned"})
    header = ["setting", "kept", "cache", "accuracy", "agrees", *(f"over {name}" for name in names)]
    return markdown(
        header,
        [
            [
                row["label"],
                percent(row["share_kept"]),
                percent(row["cache_share"]),
                interval(row["accuracy"]),
                percent(row["agreement"]["value"]),
                *(points(row["versus"].get(name, {}).get("difference")) for name in names),
            ]
            for row in rows
        ],
    )


def by_kind(rows: Sequence[Row]) -> str:
    """Accuracy of every row by question kind."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["by_kind"]))
    if not kinds:
        return ""
    return markdown(
        ["setting", *kinds],
        [[row["label"], *(percent(row["by_kind"][kind]["value"]) for kind in kinds)] for row in rows],
    )


def content(rows: Sequence[Row]) -> str:
    """How the kept count follows the picture, for the rows where it differs between pictures."""
    told = [row for row in rows if "content" in row]
    if not told:
        return ""
    numbers = list(told[0]["content"]["kept_by_shapes"])
    return markdown(
        ["setting", "with shapes", "with object patches", *(f"{n} shapes" for n in numbers)],
        [
            [
                row["label"],
                correlation(row["content"]["correlation_with_shapes"]),
                correlation(row["content"]["correlation_with_object_patches"]),
                *(f"{row['content']['kept_by_shapes'][n]:.1f}" for n in numbers),
            ]
            for row in told
        ],
    )


def percent(value: float | None) -> str:
    """One decimal; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def interval(entry: dict[str, float]) -> str:
    """An accuracy with its interval."""
    return f"{100 * entry['value']:.1f} % [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def points(entry: dict[str, float] | None) -> str:
    """A difference in percentage points with its interval; a star where the interval excludes zero."""
    if entry is None:
        return "–"
    star = "*" if entry["low"] > 0 or entry["high"] < 0 else ""
    return f"{100 * entry['value']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]{star}"


def correlation(entry: dict[str, float]) -> str:
    """A correlation with its interval."""
    return f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"
