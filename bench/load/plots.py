# SPDX-License-Identifier: Apache-2.0
"""PNG plots of a result document."""

from pathlib import Path
from typing import Any

_DPI = 130
_SHADES = ("#9ecae1", "#6baed6", "#3182bd", "#08519c", "#fdae6b", "#e6550d", "#a1d99b", "#31a354")


def write_plots(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write what the results allow: throughput by setting, and latency against load from two load points up.

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
    return written


def _throughput(results: list[dict[str, Any]], path: Path) -> Path:
    """Bars of request and output-token throughput, grouped by load, one colour per setting."""
    from matplotlib import pyplot

    loads = list(dict.fromkeys(_load(entry) for entry in results))
    settings = list(dict.fromkeys(entry["setting"] for entry in results))
    equal = any("request_throughput_at_equal_concurrency" in entry for entry in results)
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
                color=_SHADES[column % len(_SHADES)],
                yerr=spread if any(spread) else None,
                capsize=3,
            )
        axis.set_xticks(range(len(loads)), loads)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        _bare(axis)
    figure.suptitle("Throughput by setting" + (" (at equal concurrency, by Little's law)" if equal else ""))
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, len(settings)),
        frameon=False,
    )
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return path


def _latency(results: list[dict[str, Any]], key: str, label: str, path: Path) -> Path:
    """TTFT, TPOT and end-to-end latency against the load: the median solid, the 99th percentile dashed."""
    from matplotlib import pyplot

    settings = list(dict.fromkeys(entry["setting"] for entry in results))
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    for axis, (name, title) in zip(
        axes,
        (("ttft", "time to first token"), ("tpot", "time per output token"), ("e2el", "end to end")),
        strict=True,
    ):
        for column, setting in enumerate(settings):
            entries = sorted(
                (e for e in results if e["setting"] == setting), key=lambda entry: float(entry[key])
            )
            for statistic, style in (("median", "-"), ("p99", "--")):
                points = [
                    (e[key], value) for e in entries if (value := e[f"{statistic}_{name}_ms"]) is not None
                ]
                axis.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    style,
                    marker="o",
                    markersize=4,
                    color=_SHADES[column % len(_SHADES)],
                    label=f"{setting}, {statistic}",
                )
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.set_ylabel("ms")
        axis.set_ylim(bottom=0)
        _bare(axis)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(4, 2 * len(settings)),
        frameon=False,
    )
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return path


def _throughput_of(entry: dict[str, Any], key: str) -> float:
    value = entry.get(f"{key}_at_equal_concurrency", entry[key])
    return float(value or 0.0)


def _load(entry: dict[str, Any]) -> str:
    if entry["request_rate"] == "inf":
        return f"{entry['max_concurrency']} in flight"
    cap = "" if entry["max_concurrency"] is None else f"\n≤ {entry['max_concurrency']} in flight"
    return f"{entry['request_rate']:g}/s{cap}"


def _bare(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
