# SPDX-License-Identifier: Apache-2.0
"""The result document as text for a terminal of 80 columns: per load point, one line per setting."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from vtprune_loadtest.columns import TERMINAL_WIDTH, columns
from vtprune_loadtest.metrics import BY_LAYER

Entry = dict[str, Any]
_ERROR_SAMPLES = 3
_NONE = "-"
_LONG_LABEL = 15
_LATENCIES = (
    ("ttft", "TTFT"),
    ("tpot", "TPOT"),
    ("itl", "ITL"),
    ("e2el", "E2EL"),
    ("client_queue_time", "queue"),
    ("e2el_including_client_queue", "E2EL + queue"),
)
_QUEUE_LATENCIES = ("client_queue_time", "e2el_including_client_queue")
_STATISTICS = ("mean", "median", "p90", "p95", "p99")
# The server's counters worth a line; the result file has all of them.
_COUNTERS = (
    "vtprune_",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_",
    "vllm:mm_cache_",
    "vllm:num_preemptions_total",
)
_DEFINITIONS = (
    ("TTFT", "from sending to the first chunk with text (an opening role is none)"),
    ("TPOT", "(E2EL - TTFT) / (tokens - 1); - if the answer came in one chunk"),
    ("ITL", "gap between two chunks of one answer"),
    ("E2EL", "from sending to the last token"),
    ("queue", "from the intended arrival to sending: waiting for the cap"),
    ("vision", "share of the vision tokens given to the language model"),
    ("right", "share of the answers that are right"),
    ("KV", "prompt tokens kept above the prune layer"),
    ("tok/s", "answers' tokens; total: and prompts', as pruned, so pruning lowers it"),
    ("goodput", "answers per second that kept every limit of --slo"),
    ("+ queue", "goodput counting the queue"),
    ("peak", "most requests in flight at once"),
)


def render(document: dict[str, Any], samples: dict[str, list[str]], server_counters: bool = False) -> str:
    """The whole report. `samples` holds a few error messages by kind."""
    lines: list[str] = []
    for point in document["load_points"]:
        where = (point["request_rate"], point["max_concurrency"])
        entries = [e for e in document["results"] if (e["request_rate"], e["max_concurrency"]) == where]
        if entries:
            lines += ["", f"== {point['load']} ==", *_tables(entries)]
            lines += _server_lines(point) if server_counters else []
    if document["results"]:
        lines += ["", *_definitions(document["results"], "\n".join(lines))]
    if samples:
        lines += ["", "Errors"]
        for kind, messages in samples.items():
            lines += [f"  {kind}: {message}" for message in messages]
    notes = [*document["notes"], f"Seed {document['arguments']['seed']}: it makes the same requests again."]
    lines += ["", "Notes"]
    for note in notes:
        lines += textwrap.wrap(
            note, TERMINAL_WIDTH, initial_indent="  * ", subsequent_indent="    ", break_on_hyphens=False
        )
    return "\n".join(lines)


def error_samples(records: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The first few distinct messages of each kind, from (kind, message) pairs."""
    samples: dict[str, list[str]] = {}
    for kind, message in records:
        known = samples.setdefault(kind, [])
        if message not in known and len(known) < _ERROR_SAMPLES:
            known.append(message)
    return samples


def _tables(entries: Sequence[Entry]) -> list[str]:
    lines = columns(*_first_table(entries))
    lines += ["", *columns(*_latencies(entries), left=2)]
    lines += ["", *columns(*_amounts(entries))]
    if any("total_input_tokens_before_pruning" in entry for entry in entries):
        lines += ["", *columns(*_tokens(entries))]
    if any("right" in entry for entry in entries):
        lines += ["", *columns(*_graded(entries))]
    for entry in entries:
        if (levels := entry.get("levels")) and entry["completed"]:
            shares = (f"{name} {percent(count / entry['completed'])}" for name, count in levels.items())
            lines += ["", f"{entry['setting']} was {', '.join(shares)} of the answers"]
    kinds = sorted({kind for entry in entries for kind in entry["errors_by_kind"]})
    if kinds:
        rows = [[e["setting"], *(str(e["errors_by_kind"].get(kind, 0)) for kind in kinds)] for e in entries]
        lines += ["", *columns(["errors", *kinds], rows)]
    return lines


def _first_table(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Ratio to the first, throughput, median latencies in ms, shares of vision tokens kept, answers right."""
    header = ["setting", "req/s", "TTFT ms", "TPOT ms", "E2EL ms"]
    rows = []
    for entry in entries:
        throughput = entry.get("request_throughput_at_equal_concurrency", entry["request_throughput"])
        latencies = [entry[f"median_{name}_ms"] for name in ("ttft", "tpot", "e2el")]
        rows.append([entry["setting"], *map(number, (throughput, *latencies))])
    if any("vision_tokens_kept_share" in entry for entry in entries):
        header.append("vision")
        for row, entry in zip(rows, entries, strict=True):
            row.append(percent(entry.get("vision_tokens_kept_share")))
    if any("right" in entry for entry in entries):
        header.append("right")
        for row, entry in zip(rows, entries, strict=True):
            row.append(percent(entry.get("right")))
    if len(entries) > 1:
        first = entries[0]["setting"]
        header.insert(1, f"vs {first if len(first) <= _LONG_LABEL else 'the first'}")
        for row, entry in zip(rows, entries, strict=True):
            row.insert(1, "1" if entry is entries[0] else _ratio(entry))
    return header, rows


def _ratio(entry: Entry) -> str:
    ratio = entry.get("ratio_to_first")
    if ratio is None:
        return _NONE
    if ratio["pieces"] == 1:
        return f"{ratio['median']:.2f}"
    return f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def _latencies(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    capped = any(entry["max_concurrency"] is not None for entry in entries)
    rows = []
    for entry in entries:
        for key, name in _LATENCIES:
            if key in _QUEUE_LATENCIES and not capped:
                continue  # without a cap only a late client makes requests wait, and the notes tell of that
            values = [entry.get(f"{statistic}_{key}_ms") for statistic in _STATISTICS]
            if any(value is not None for value in values) or f"mean_{key}_ms" in entry:
                label = entry["setting"] if key == "ttft" else ""
                rows.append([label, name, *(number(value) for value in values)])
    return ["latency in ms", "", *_STATISTICS], rows


def _amounts(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    shown = (
        ("done", "completed"),
        ("failed", "failed"),
        ("seconds", "duration"),
        ("req/s sd", "request_throughput_std_over_phases"),
        ("goodput", "request_goodput"),
        ("+ queue", "request_goodput_including_client_queue"),
        ("tok/s", "output_throughput"),
        ("total", "total_token_throughput"),
        ("peak", "max_concurrent_requests"),
    )
    present = [(name, key) for name, key in shown if any(entry.get(key) is not None for entry in entries)]
    rows = [[entry["setting"], *(number(entry.get(key)) for _, key in present)] for entry in entries]
    return ["load", *(name for name, _ in present)], rows


def _graded(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Answers graded, and the interval of the share of right ones."""
    header = ["answers", "graded", "right", "95% interval", "pictures", "cut off", "no answer"]
    keys = ("answers_graded", "answers_right", "pictures_asked_about", "answers_cut_off")
    rows = []
    for entry in entries:
        graded, right, pictures, cut_off = (number(entry.get(key)) for key in keys)
        interval = (
            f"{percent(entry['right_low'])} to {percent(entry['right_high'])}" if "right" in entry else _NONE
        )
        rows.append([entry["setting"], graded, right, interval, pictures, cut_off, str(entry["failed"])])
    return header, rows


def _tokens(entries: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Means per answer, before and after pruning."""
    header = ["tokens per answer", "prompt", "pruned", "vision", "kept", "KV", "kept", "output"]
    keys = (
        "total_input_tokens_before_pruning",
        "total_input_tokens",
        "vision_tokens",
        "vision_tokens_kept",
        "kv_tokens",
        "kv_tokens_kept",
        "total_output_tokens",
    )
    return header, [[entry["setting"], *(_mean(entry, key) for key in keys)] for entry in entries]


def _kv_kept(entry: Entry) -> str:
    """Above each prune layer, from the lowest up."""
    by_layer = entry.get(BY_LAYER) or [entry.get("kv_tokens_kept")]
    return "/".join(_per_answer(total, entry) for total in by_layer)


def _mean(entry: Entry, key: str) -> str:
    return _kv_kept(entry) if key == "kv_tokens_kept" else _per_answer(entry.get(key), entry)


def _per_answer(total: float | None, entry: Entry) -> str:
    answers = entry["completed"]
    return _NONE if total is None or not answers else f"{total / answers:.0f}"


def _definitions(entries: Sequence[Entry], shown: str) -> list[str]:
    """What the columns mean, those alone that the tables have."""
    words = set(shown.split())
    alone = any("request_throughput_at_equal_concurrency" in entry for entry in entries)
    lines = [("req/s", "answers per second" + (" at equal concurrency (Little's law)" if alone else ""))]
    told = next((entry["ratio_to_first"] for entry in entries if entry.get("ratio_to_first")), None)
    if told is not None:
        of = "mean E2EL" if told["of"] == "mean_e2el_ms" else "req/s"
        pieces = f"{told['pieces']} {told['piece']}s" + (" of requests" if told["piece"] == "group" else "")
        lines.insert(0, ("vs", f"ratio of {of} within {pieces}: median [{told['interval']}]"))
    lines += [(name, text) for name, text in _DEFINITIONS if set(name.split()) <= words]
    return [f"{name:<8} {text}" for name, text in lines]


def _server_lines(point: dict[str, Any]) -> list[str]:
    grown = {
        name: value
        for name, value in point.get("server_metrics", {}).items()
        if name.startswith(_COUNTERS) and "_bucket" not in name
    }
    if not grown:
        return []
    lines = [f"  {name}  {value:g}" for name, value in sorted(grown.items())]
    return ["", "server counters, grown by:", *lines]


def number(value: float | None) -> str:
    """A number as short as it says something; a dash where there is none."""
    if value is None:
        return _NONE
    if isinstance(value, int):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share of 1 as a percentage; a dash where there is none."""
    return _NONE if share is None else f"{100 * share:.1f}%"
