# SPDX-License-Identifier: Apache-2.0
"""PNG plots of evaluations; they need matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DPI = 130
#: Drawn thick and with their confidence band; the others thin, so that a dozen lines can be told apart.
_MAIN = {"inflection": "#c1121f", "inflection, adaptive": "#c1121f", "random": "#555555", "topk": "#20639b"}
_COLOURS = (
    *("#e68613", "#2a9d8f", "#8338ec", "#b5838d", "#588157", "#f15bb5"),
    *("#774936", "#00b4d8", "#b08900", "#1d3557", "#90be6d"),
)
ADAPTIVE = ", adaptive"
_MARKERS = "osD^vP*Xph<>d"

Row = dict[str, Any]
Series = dict[str, list[tuple[float, dict[str, float]]]]


@contextmanager
def plotted(
    path: Path, rows: int = 1, columns: int = 1, dpi: int = _DPI, **how: Any
) -> Iterator[tuple[Any, Any]]:
    """A figure to draw into, which is written once it is drawn.

    Args:
        path: the PNG to write.
        rows: of axes.
        columns: of axes.
        dpi: dots per inch.
        how: further arguments of `matplotlib.pyplot.subplots`.

    Yields:
        The figure and its axes, as `subplots` gives them.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, layout="constrained", **how)
    try:
        yield figure, axes
        figure.savefig(path, dpi=dpi)
    finally:
        pyplot.close(figure)


def bare(axis: Any) -> None:
    """Draw a faint grid, and no frame but the two axes."""
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw_unpruned(axis: Any, accuracy: Mapping[str, float]) -> None:
    """The unpruned model's accuracy as a line with its interval as a band, in per cent."""
    axis.axhspan(100 * accuracy["low"], 100 * accuracy["high"], color="black", alpha=0.08, linewidth=0)
    axis.axhline(100 * accuracy["value"], color="black", linewidth=1, label="unpruned")


def series_by_method(rows: Sequence[Row], *, baselines: bool = True) -> Series:
    """Points (share kept, accuracy) by method, and of the baselines that were not run by themselves."""
    series: Series = {}
    for row in rows:
        if not row["versus"]:
            continue
        method = str(row["setting"]["method"])
        series.setdefault(method, []).append((row["share_kept"], row["accuracy"]))
    if baselines:
        for row in rows:
            for name, entry in row["versus"].items():
                if name != "unpruned" and name not in {r["setting"]["method"] for r in rows}:
                    series.setdefault(name, []).append((row["share_kept"], entry["accuracy"]))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}


def plot_accuracy(
    series: Series, unpruned: dict[str, float], title: str, path: Path, x: str = "share of vision tokens kept"
) -> Path:
    """Accuracy against what is kept, one line per name, the unpruned model as a line with its band."""
    with plotted(path, figsize=(8.5, 5)) as (_, axis):
        draw_unpruned(axis, unpruned)
        others = list(dict.fromkeys(name.removesuffix(ADAPTIVE) for name in series if name not in _MAIN))
        for name, points in series.items():
            shares = [100 * share for share, _ in points]
            values, low, high = (
                [100 * entry[key] for _, entry in points] for key in ("value", "low", "high")
            )
            main = name in _MAIN
            at = others.index(name.removesuffix(ADAPTIVE)) if not main else 0
            colour = _MAIN[name] if main else _COLOURS[at % len(_COLOURS)]
            axis.plot(
                shares,
                values,
                color=colour,
                marker="o" if main else _MARKERS[at % len(_MARKERS)],
                markersize=5,
                linewidth=2.2 if main else 1.1,
                linestyle="--" if name == "random" else ":" if not main and name.endswith(ADAPTIVE) else "-",
                zorder=3 if main else 2,
                label=name,
            )
            if main or len(series) <= 4:
                axis.fill_between(shares, low, high, color=colour, alpha=0.13, linewidth=0)
        axis.set_xlabel(f"{x} (%)")
        axis.set_ylabel("questions answered right (%)")
        axis.set_title(title)
        bare(axis)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return path


def plot_curve(curves: dict[str, list[float]], cuts: dict[str, float], path: Path) -> Path:
    """Mean sorted similarity curves and where the presets cut on average.

    Args:
        curves: name to mean sorted scores, [N].
        cuts: name to mean share kept.
        path: the PNG to write.
    """
    from matplotlib import colormaps

    with plotted(path, figsize=(7, 4.2)) as (_, axis):
        for at, (name, curve) in enumerate(curves.items()):
            places = [100 * (k + 1) / len(curve) for k in range(len(curve))]
            axis.plot(
                places, curve, color=colormaps["viridis"](0.85 * at / max(1, len(curves) - 1)), label=name
            )
        for name, share in cuts.items():
            axis.axvline(100 * share, color="#c1121f", linestyle="--", linewidth=1)
            axis.text(
                100 * share + 0.6,
                axis.get_ylim()[1],
                name,
                rotation=90,
                va="top",
                fontsize=8,
                color="#c1121f",
            )
        axis.set_xlabel("patches by falling similarity (%)")
        axis.set_ylabel("cosine to CLS, mean over pictures")
        bare(axis)
        axis.legend(frameon=False)
    return path
