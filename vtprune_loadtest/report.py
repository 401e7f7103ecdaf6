# SPDX-License-Identifier: Apache-2.0
"""The result document as text: one table per load point, one column per setting."""

from collections.abc import Iterable, Sequence
from typing import Any

from vtprune_loadtest.metrics import PERCENTILES

_LABEL_WIDTH = 40
_ERROR_SAMPLES = 3
_STATISTICS = ("mean", "median", *(f"p{p}" for p in PERCENTILES))
_LATENCIES = (
    ("ttft", "TTFT"),
    ("tpot", "TPOT"),
    ("itl", "ITL"),
    ("e2el", "end-to-end"),
    ("client_queue_time", "client queue"),
    ("e2el_including_client_queue", "end-to-end with queue"),
)
_QUEUE_LATENCIES = ("client_queue_time", "e2el_including_client_queue")
# (key, what the row is called); a row shows where at least one setting has the key.
_ROWS = (
    ("completed", "requests completed"),
    ("failed", "requests failed"),
    ("duration", "duration (s)"),
    ("request_throughput", "request throughput (req/s)"),
    ("request_throughput_std_over_phases", "  standard deviation over phases"),
    ("request_throughput_at_equal_concurrency", "  at equal concurrency (req/s)"),
    ("request_goodput", "request goodput (req/s)"),
    ("request_goodput_including_client_queue", "  counting the client queue (req/s)"),
    ("output_throughput", "output throughput (tok/s)"),
    ("output_throughput_std_over_phases", "  standard deviation over phases"),
    ("output_throughput_at_equal_concurrency", "  at equal concurrency (tok/s)"),
    ("total_token_throughput", "total token throughput (tok/s)"),
    ("max_concurrent_requests", "peak concurrent requests"),
    ("total_input_tokens", "input tokens given to the model"),
    ("total_input_tokens_before_pruning", "  before pruning"),
    ("total_output_tokens", "output tokens"),
    ("vision_tokens", "vision tokens before"),
    ("vision_tokens_kept", "vision tokens after"),
    ("vision_tokens_kept_share", "  share kept"),
    ("kv_tokens", "KV tokens before"),
    ("kv_tokens_kept", "KV tokens after"),
    ("kv_tokens_kept_share", "  share kept"),
)
# The server's counters worth a line; the result file has all of them.
_COUNTERS = (
    "vtprune_",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:prefix_cache_",
    "vllm:mm_cache_",
    "vllm:num_preemptions_total",
)


def render(document: dict[str, Any], samples: dict[str, list[str]]) -> str:
    """The whole report. `samples` holds a few error messages by kind."""
    lines: list[str] = []
    for point in document["load_points"]:
        where = (point["request_rate"], point["max_concurrency"])
        entries = [e for e in document["results"] if (e["request_rate"], e["max_concurrency"]) == where]
        if entries:
            lines += ["", f"== {point['load']} ==", *_table(entries), *_server_lines(point)]
    if samples:
        lines += ["", "Errors"]
        for kind, messages in samples.items():
            lines += [f"  {kind}: {message}" for message in messages]
    if document["notes"]:
        lines += ["", "Notes", *(f"  * {note}" for note in document["notes"])]
    return "\n".join(lines)


def error_samples(records: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The first few distinct messages of each kind, from (kind, message) pairs."""
    samples: dict[str, list[str]] = {}
    for kind, message in records:
        known = samples.setdefault(kind, [])
        if message not in known and len(known) < _ERROR_SAMPLES:
            known.append(message)
    return samples


def _table(entries: Sequence[dict[str, Any]]) -> list[str]:
    rows = [(label, [entry.get(key) for entry in entries]) for key, label in _ROWS]
    capped = any(entry["max_concurrency"] is not None for entry in entries)
    for key, label in _LATENCIES:
        if key in _QUEUE_LATENCIES and not capped:
            continue  # without a cap only a late client makes requests wait, and the notes tell of that
        for statistic in _STATISTICS:
            rows.append(
                (f"{label} {statistic} (ms)", [entry.get(f"{statistic}_{key}_ms") for entry in entries])
            )
    for kind in sorted({kind for entry in entries for kind in entry["errors_by_kind"]}):
        rows.append((f"errors: {kind}", [entry["errors_by_kind"].get(kind, 0) for entry in entries]))
    table = [
        (label, [_number(value) for value in values])
        for label, values in rows
        if any(v is not None for v in values)
    ]
    header = [entry["setting"] for entry in entries]
    widths = [
        max(len(title), *(len(cells[column]) for _, cells in table)) for column, title in enumerate(header)
    ]
    return [
        f"{label:<{_LABEL_WIDTH}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, cells in [("", header), *table]
    ]


def _server_lines(point: dict[str, Any]) -> list[str]:
    grown = {
        name: value
        for name, value in point.get("server_metrics", {}).items()
        if name.startswith(_COUNTERS) and "_bucket" not in name
    }
    if not grown:
        return []
    return ["server counters, grown by:", *(f"  {name}  {value:g}" for name, value in sorted(grown.items()))]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
