# SPDX-License-Identifier: Apache-2.0
"""The statistics of one setting at one load point, under the key names of `vllm bench serve`.

The formulas are `calculate_metrics`'s of vllm/benchmarks/serve.py. Differences: an answer that never came has
no latency, so a statistic without data is None and not 0; the peak number of concurrent requests is exact
rather than counted by whole seconds.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from vllm_vtprune.contract import PRESETS
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.record import RequestRecord
from vtprune_loadtest.shares import wilson_of_groups

PERCENTILES = (90, 95, 99)
SLO_NAMES = ("ttft", "tpot", "e2el")
VTPRUNE_FIELDS = ("vision_tokens", "vision_tokens_kept", "kv_tokens", "kv_tokens_kept")
BY_LAYER = "kv_tokens_kept_by_layer"


def parse_slo(text: str) -> dict[str, float]:
    """Read `ttft:500,tpot:50,e2el:2000`, limits in milliseconds.

    Raises:
        LoadTestError: an unknown name, a name given twice, or a limit that is no positive number.
    """
    limits: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.strip().partition(":")
        if name not in SLO_NAMES or name in limits:
            raise LoadTestError(
                f"--slo takes each of {', '.join(SLO_NAMES)} once, like ttft:500,tpot:50; got {item!r}."
            )
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = 0.0
        if not 0 < limits[name] < float("inf"):
            raise LoadTestError(f"--slo {item!r}: the limit must be a positive number of milliseconds.")
    return limits


def summarise(
    records: Sequence[RequestRecord], duration_s: float, slo: Mapping[str, float], is_open_loop: bool
) -> dict[str, Any]:
    """Statistics of measured requests of one setting.

    Args:
        records: finished requests, failed ones included.
        duration_s: the time over which they ran; throughputs are divided by it.
        slo: limits in milliseconds; empty for no goodput.
        is_open_loop: requests had intended arrival times, so waiting before the sending counts.
    """
    done = [record for record in records if record.ok]
    output_tokens = sum(record.output_tokens for record in done)
    input_tokens = sum(record.prompt_tokens or 0 for record in done)
    summary: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(done),
        "failed": len(records) - len(done),
        "errors_by_kind": dict(Counter(record.error_kind for record in records if not record.ok)),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": _ratio(len(done), duration_s),
        "request_goodput": _ratio(_good(done, slo, with_queue=False), duration_s) if slo else None,
        "output_throughput": _ratio(output_tokens, duration_s),
        "total_token_throughput": _ratio(input_tokens + output_tokens, duration_s),
        "max_output_tokens_per_s": _peak_token_rate(done),
        "max_concurrent_requests": _peak_concurrency(records),
        "busy_time_s": sum(record.done_s - record.sent_s for record in records),
        "output_tokens_per_chunk": _ratio(output_tokens, sum(len(record.token_times_s) for record in done)),
    }
    summary |= _statistics("ttft", [record.ttft_s for record in done])
    summary |= _statistics("tpot", [tpot for record in done if (tpot := record.tpot_s) is not None])
    summary |= _statistics("itl", [gap for record in done for gap in record.itl_s])
    summary |= _statistics("e2el", [record.e2el_s for record in done])
    if is_open_loop:
        if slo:
            good = _good(done, slo, with_queue=True)
            summary["request_goodput_including_client_queue"] = _ratio(good, duration_s)
        queues = [record.client_queue_s for record in done]
        summary |= _statistics("client_queue_time", queues)
        summary |= _statistics(
            "e2el_including_client_queue", [r.e2el_s + queue for r, queue in zip(done, queues, strict=True)]
        )
    levels = Counter(record.level for record in done if record.level is not None)
    if levels:
        summary["levels"] = {level: levels[level] for level in PRESETS if level in levels}
    return summary | _pruning(done) | _graded(done)


def at_equal_concurrency(summaries: Sequence[dict[str, Any]]) -> None:
    """Add to each setting's summary the throughput it would have had alone, by Little's law.

    Settings that take turns in one closed loop all complete the same number of requests in the same time, so
    their measured throughputs are equal by construction. N requests in flight of mean residence time R pass N
    / R requests per second (Little 1961, "A Proof for the Queuing Formula L = lambda W"). N is the mean
    number in flight of the whole mix, R the setting's own mean time (a failed request costs time and
    completes nothing). R was measured beside the other settings, which usually narrows the differences
    between settings; phases of one setting each (interleaving by blocks) measure them directly.
    """
    in_flight = _ratio(sum(s["busy_time_s"] for s in summaries), summaries[0]["duration"]) or 0.0
    for summary in summaries:
        share = _ratio(in_flight, summary["busy_time_s"])
        summary["request_throughput_at_equal_concurrency"] = share and share * summary["completed"]
        summary["output_throughput_at_equal_concurrency"] = share and share * summary["total_output_tokens"]


def _pruning(done: Sequence[RequestRecord]) -> dict[str, Any]:
    """Token sums before and after pruning, over the answers that report them; nothing if none does."""
    reports = [record for record in done if record.vtprune is not None]
    sums = {
        name: sum(values)
        for name in VTPRUNE_FIELDS
        if (values := [r.vtprune[name] for r in reports if r.vtprune is not None and name in r.vtprune])
    }
    summary: dict[str, Any] = dict(sums)
    # a server with several prune layers counts the tokens above each
    by_layer = [r.vtprune[BY_LAYER] for r in reports if r.vtprune is not None and BY_LAYER in r.vtprune]
    if by_layer:
        summary[BY_LAYER] = [sum(tokens) for tokens in zip_longest(*by_layer, fillvalue=0)]
    for kind in ("vision_tokens", "kv_tokens"):
        if kind in sums and f"{kind}_kept" in sums:
            summary[f"{kind}_kept_share"] = _ratio(sums[f"{kind}_kept"], sums[kind])
    if "vision_tokens" in sums:
        # prompt_tokens counts what the model was given: a setting that prunes more would look as if it did
        # less.
        dropped = sums["vision_tokens"] - sums.get("vision_tokens_kept", sums["vision_tokens"])
        summary["total_input_tokens_before_pruning"] = (
            sum(record.prompt_tokens or 0 for record in done) + dropped
        )
    return summary


def _graded(done: Sequence[RequestRecord]) -> dict[str, Any]:
    """The share of right answers among those that came to questions of a file; nothing without any."""
    asked = [(record, question) for record in done if (question := record.question) is not None]
    if not asked:
        return {}
    right = [bool(record.right) for record, _ in asked]
    share = wilson_of_groups(right, [question.image for _, question in asked])
    of, by_kind = (
        Counter(question.kind for keep, (_, question) in zip(kept, asked, strict=True) if keep)
        for kept in ([True] * len(asked), right)
    )
    return {
        "right": share.value,
        "right_low": share.low,
        "right_high": share.high,
        "answers_graded": len(asked),
        "answers_right": sum(right),
        "answers_cut_off": sum(record.finish_reason == "length" for record, _ in asked),
        "pictures_asked_about": len({question.image for _, question in asked}),
        "right_by_kind": {kind: {"right": by_kind[kind], "of": of[kind]} for kind in sorted(of)},
    }


def _statistics(name: str, seconds: Iterable[float]) -> dict[str, float | None]:
    values = np.fromiter(seconds, dtype=np.float64) * 1000
    if not values.size:
        keys = ["mean", "median", "std", *(f"p{p}" for p in PERCENTILES)]
        return {f"{key}_{name}_ms": None for key in keys}
    percentiles = np.percentile(values, PERCENTILES)
    statistics: dict[str, float | None] = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    return statistics | {f"p{p}_{name}_ms": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)}


def _good(done: Iterable[RequestRecord], slo: Mapping[str, float], *, with_queue: bool) -> int:
    """How many answers kept every limit; one of a single token has no TPOT and keeps that limit."""
    good = 0
    for record in done:
        queue = record.client_queue_s if with_queue else 0.0
        times = {"ttft": record.ttft_s + queue, "tpot": record.tpot_s or 0.0, "e2el": record.e2el_s + queue}
        good += all(times[name] * 1000 <= limit for name, limit in slo.items())
    return good


def _peak_token_rate(done: Sequence[RequestRecord]) -> float:
    """The most chunks that came in one of the whole seconds after the first request was sent."""
    if not done:
        return 0.0
    start = min(record.sent_s for record in done)
    seconds = Counter(int(at - start) for record in done for at in record.token_times_s)
    return float(max(seconds.values()))


def _peak_concurrency(records: Iterable[RequestRecord]) -> int:
    changes = [change for r in records for change in ((r.sent_s, 1), (r.done_s, -1))]
    now = peak = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
