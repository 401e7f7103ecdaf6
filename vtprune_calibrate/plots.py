# SPDX-License-Identifier: Apache-2.0
"""The plots of a calibration: answers against FLOPs and KV bytes, and the presets. They need matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtprune_eval.calibrate import Calibration
from vtprune_eval.plots import bare, draw_unpruned, plotted
from vtprune_eval.tables import Row

_AXES = {"flops": "share of the prefill's FLOPs (%)", "kv_bytes": "share of the KV bytes (%)"}
_NAMED = ("#c1121f", "#e68613", "#2a9d8f", "#8338ec", "#7a4a00", "#d63f9c", "#111111", "#7f7f7f")
_MARKERS = "os^Dv<>p"
_CHANCE: dict[str, Any] = {"fillstyle": "none", "linestyle": ""}


def plot_costs(
    unpruned: Row, one_border: Sequence[Row], schedules: Sequence[Row], title: str, path: Path
) -> Path:
    """Answers against both costs.

    Args:
        unpruned: the row of the whole model.
        one_border: rows of single prune layers, drawn as a line for each layer.
        schedules: rows drawn with their intervals, and random dropping at their counts beside them.
        title: the plot's.
        path: the PNG to write.
    """
    with plotted(path, 1, 2, figsize=(12, 4.8), sharey=True) as (figure, axes):
        for axis, (cost, label) in zip(axes, _AXES.items(), strict=True):
            draw_unpruned(axis, unpruned["accuracy"])
            _lines(axis, one_border, cost)
            for row, colour, marker in zip(
                schedules, itertools.cycle(_NAMED), itertools.cycle(_MARKERS), strict=False
            ):
                _point(axis, row, cost, colour, marker)
            if any("random" in row["versus"] for row in schedules):
                axis.plot([], [], **_CHANCE, color="#555555", marker="o", label="hollow: random, same cost")
            axis.set_xlabel(label)
            bare(axis)
        axes[0].set_ylabel("questions answered right (%)")
        axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle(title)
    return path


def _lines(axis: Any, rows: Sequence[Row], cost: str) -> None:
    from matplotlib import colormaps

    names = list(dict.fromkeys(row["name"] for row in rows))
    for at, name in enumerate(names):
        found = sorted((row[cost], row["accuracy"]["value"]) for row in rows if row["name"] == name)
        axis.plot(
            [100 * x for x, _ in found],
            [100 * y for _, y in found],
            color=colormaps["Blues"](0.9 - 0.55 * at / max(1, len(names) - 1)),
            marker=".",
            linewidth=1.1,
            label=f"one prune layer, {name}",
        )


def _point(axis: Any, row: Row, cost: str, colour: str, marker: str) -> None:
    found, x = row["accuracy"], 100 * row[cost]
    spread = [[100 * (found["value"] - found["low"])], [100 * (found["high"] - found["value"])]]
    style = {"color": colour, "marker": marker, "linestyle": ""}
    axis.errorbar(x, 100 * found["value"], yerr=spread, capsize=3, zorder=3, label=row["name"], **style)
    if (chance := row["versus"].get("random")) is not None:
        y = 100 * chance["accuracy"]["value"]
        axis.plot(x, y, **_CHANCE, color=colour, marker=marker)


def plot_presets(found: Calibration, wanted: Mapping[str, float], name: str, path: Path) -> Path:
    """The mean share kept at every aggressiveness, and where the presets lie.

    Args:
        found: the calibration.
        wanted: preset to share.
        name: the model's, for the title.
        path: the PNG to write.
    """
    with plotted(path, figsize=(6.4, 4)) as (_, axis):
        axis.plot(list(found.shares), [100 * share for share in found.shares.values()], color="#1d3557")
        for (preset, share), colour in zip(wanted.items(), _NAMED, strict=False):
            amount = found.chosen[share]
            axis.plot(amount, 100 * found.shares[amount], "o", color=colour, label=f"{preset}: {amount:g}")
        axis.set(xlim=(0, 1), ylim=(0, 100), xlabel="aggressiveness", ylabel="vision tokens kept (%)")
        axis.set_title(f"{name}: mean share kept", fontsize=11)
        bare(axis)
        axis.legend(frameon=False)
    return path
