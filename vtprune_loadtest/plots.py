# SPDX-License-Identifier: Apache-2.0
"""PNG plots of a result document."""

from itertools import pairwise
from pathlib import Path
from typing import Any

_DPI = 130


def write_plots(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write what the results allow.

    Throughput by setting; from two load points up latency against load, and where there are limits or graded
    answers, goodput, tokens kept and answers right against load.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    results = [entry for entry in document["results"] if entry["completed"]]
    if not results:
        return []
    written = [_throughput(results, folder / "throughput.png")]
    for axis, key in (("request rate (1/s)", "request_rate"), ("concurrency", "max_concurrency")):
        entries = [
            entry for entry in results if (entry["request_rate"] == "inf") == (key == "max_concurrency")
        ]
        if len({entry[key] for entry in entries}) > 1:
            written.append(_latency(entries, key, axis, folder / f"latency_{key}.png"))
            if any(entry.get("request_goodput") is not None or "right" in entry for entry in entries):
                written.append(_answers(entries, key, axis, folder / f"answers_{key}.png"))
    return written


def _throughput(results: list[dict[str, Any]], path: Path) -> Path:
    """Bars of request and output-token throughput, grouped by load, one colour per setting."""
    from matplotlib import pyplot

    loads = list(dict.fromkeys(_load(entry) for entry in results))
    settings = list(dict.fromkeys(entry["setting"] for entry in results))
    colours = _colours(len(settings))
    figure, axes = pyplot.subplots(1, 2, figsize=(4 + 1.6 * max(3, len(loads)), 4.2), layout="constrained")
    for axis, key, unit in zip(
        axes, ("request_throughput", "output_throughput"), ("requests/s", "output tokens/s"), strict=True
    ):
        width = 0.8 / len(settings)
        for column, setting in enumerate(settings):
            entries = {_load(entry): entry for entry in results if entry["setting"] == setting}
            places = [place for place, load in enumerate(loads) if load in entries]
            heights = [_throughput_of(entries[loads[place]], key) for place in places]
            spread = [entries[loads[place]].get(f"{key}_std_over_phases", 0.0) for place in places]
            at = [place - 0.4 + width * (column + 0.5) for place in places]
            axis.bar(
                at,
                heights,
                width * 0.92,
                label=setting,
                color=colours[column],
                yerr=spread if any(spread) else None,
                capsize=3,
            )
        axis.set_xticks(range(len(loads)), loads)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        _bare(axis)
    figure.suptitle("Throughput by setting" + _caveat(results))
    return _written(figure, axes[0], len(settings), path)


def _latency(results: list[dict[str, Any]], key: str, label: str, path: Path) -> Path:
    """TTFT, TPOT and end-to-end latency against the load: the median solid, the 99th percentile dashed."""
    from matplotlib import pyplot

    series = _series(results, key)
    colours = _colours(len(series))
    panels = (("ttft", "time to first token"), ("tpot", "time per output token"), ("e2el", "end to end"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 4.2), layout="constrained")
    for axis, (metric, title) in zip(axes, panels, strict=True):
        for (name, entries), colour in zip(series.items(), colours, strict=True):
            for statistic, style in (("median", "-"), ("p99", "--")):
                points = [
                    (entry[key], value)
                    for entry in sorted(entries, key=lambda entry: float(entry[key]))
                    if (value := entry[f"{statistic}_{metric}_ms"]) is not None
                ]
                axis.plot(
                    [load for load, _ in points],
                    [value for _, value in points],
                    style,
                    marker="o",
                    markersize=4,
                    color=colour,
                    label=f"{name}, {statistic}",
                )
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_xticks(sorted({entry[key] for entry in results}))
        axis.set_ylabel("ms")
        axis.set_ylim(bottom=0)
        _bare(axis)
    return _written(figure, axes[0], len(series), path)


def _answers(results: list[dict[str, Any]], key: str, label: str, path: Path) -> Path:
    """Goodput, share of the vision tokens kept, and share of right answers against the load.

    Whiskers are the 95 % interval; there settings stand a little apart, so as not to hide each other's.
    """
    from matplotlib import pyplot

    panels = [
        panel
        for panel in (
            ("request_goodput", "answers in time", "per second", 1),
            ("vision_tokens_kept_share", "vision tokens kept", "%", 100),
            ("right", "answers right", "% of the answers", 100),
        )
        if any(entry.get(panel[0]) is not None for entry in results)
    ]
    series = _series(results, key)
    colours = _colours(len(series))
    loads = sorted({float(entry[key]) for entry in results})
    apart = 0.04 * min(b - a for a, b in pairwise(loads))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for axis, (measure, title, unit, scale) in zip(axes[0], panels, strict=True):
        for number, ((name, entries), colour) in enumerate(zip(series.items(), colours, strict=True)):
            shown = sorted(
                (entry for entry in entries if entry.get(measure) is not None),
                key=lambda entry: float(entry[key]),
            )
            values = [scale * entry[measure] for entry in shown]
            shift, spread = 0.0, None
            if measure == "right":
                shift = apart * (number - (len(series) - 1) / 2)
                spread = [
                    [value - scale * entry["right_low"] for value, entry in zip(values, shown, strict=True)],
                    [scale * entry["right_high"] - value for value, entry in zip(values, shown, strict=True)],
                ]
            axis.errorbar(
                [entry[key] + shift for entry in shown],
                values,
                spread,
                fmt="-o",
                markersize=4,
                capsize=3,
                color=colour,
                label=name,
            )
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_xticks(loads)
        axis.set_ylabel(unit)
        if measure != "right":
            axis.set_ylim(bottom=0)
        _bare(axis)
    return _written(figure, axes[0][0], len(series), path)


def _written(figure: Any, axis: Any, labels: int, path: Path) -> Path:
    """Save a figure whose panels share the legend of one of them, with so many labels in it."""
    from matplotlib import pyplot

    figure.legend(
        *axis.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, labels),
        frameon=False,
    )
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return path


def _series(results: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """The results by line of the plot: one per setting, or per setting and cap if rates ran under several."""
    several = key == "request_rate" and len({entry["max_concurrency"] for entry in results}) > 1
    series: dict[str, list[dict[str, Any]]] = {}
    for entry in results:
        name = f"{entry['setting']} ≤ {entry['max_concurrency']}" if several else entry["setting"]
        series.setdefault(name, []).append(entry)
    return series


def _throughput_of(entry: dict[str, Any], key: str) -> float:
    value = entry.get(f"{key}_at_equal_concurrency", entry[key])
    return float(value or 0.0)


def _load(entry: dict[str, Any]) -> str:
    if entry["request_rate"] == "inf":
        return f"{entry['max_concurrency']} in flight"
    cap = "" if entry["max_concurrency"] is None else f"\n≤ {entry['max_concurrency']} in flight"
    return f"{entry['request_rate']:g}/s{cap}"


def _caveat(results: list[dict[str, Any]]) -> str:
    """What the bars are where they are not simply measured one setting at a time."""
    if any("request_throughput_at_equal_concurrency" in entry for entry in results):
        return " (at equal concurrency, by Little's law)"
    if len({entry["setting"] for entry in results}) > 1 and not any("phases" in entry for entry in results):
        return " (each one's share of the mix)"
    if any("request_throughput_std_over_phases" in entry for entry in results):
        return " (with the standard deviation over phases)"
    return ""


def _colours(count: int) -> list[Any]:
    """From dark to light in the order of the settings, so a sweep of one quantity reads as a scale."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.85 * index / max(1, count - 1)) for index in range(count)]


def _bare(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
