# SPDX-License-Identifier: Apache-2.0
"""How each setting compares with the first, as a ratio with an interval.

The run is cut into pieces that hold every setting once: its rounds where settings are interleaved by blocks,
groups of consecutive requests where they take turns (the method of batch means: Law 2015, "Simulation
Modeling and Analysis", chapter 9). Ratios are taken within a piece, so what the machine does meanwhile hits
both sides.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from vtprune_loadtest.record import RequestRecord
from vtprune_loadtest.spread import Spread

_GROUPS = 10
_REQUESTS_PER_GROUP = 4


def in_groups(records: Sequence[RequestRecord]) -> list[list[RequestRecord]]:
    """The records of one setting in up to ten groups of consecutive requests, four in each at least."""
    ordered = sorted(records, key=lambda record: record.intended_s)
    groups = max(1, min(_GROUPS, len(ordered) // _REQUESTS_PER_GROUP))
    edges = [len(ordered) * number // groups for number in range(groups + 1)]
    return [ordered[start:end] for start, end in pairwise(edges)]


def answered_per_second(records: Sequence[RequestRecord], duration_s: float) -> float:
    """Requests per second of a piece that had the server for itself."""
    return sum(record.ok for record in records) / duration_s if duration_s else math.nan


def answered_per_busy_second(records: Sequence[RequestRecord]) -> float:
    """Requests per second and slot: what throughput at equal concurrency is proportional to."""
    busy = sum(record.done_s - record.sent_s for record in records)
    return sum(record.ok for record in records) / busy if busy else math.nan


def mean_latency(records: Sequence[RequestRecord]) -> float:
    """Mean end-to-end latency of the answers, in seconds; NaN without any."""
    latencies = [record.e2el_s for record in records if record.ok]
    return math.fsum(latencies) / len(latencies) if latencies else math.nan


def ratio_to_first(
    measure: str, piece: str, values: Sequence[float], first: Sequence[float]
) -> dict[str, Any] | None:
    """The entry `ratio_to_first` of a result; None where no piece has a ratio.

    Args:
        measure: the key of the result whose ratio it is.
        piece: what the run was cut into, `round` or `group`.
        values: the setting's, piece by piece.
        first: the first setting's.
    """
    ratios = [
        value / base
        for value, base in zip(values, first, strict=False)
        if math.isfinite(value) and math.isfinite(base) and value > 0 and base > 0
    ]
    if not ratios:
        return None
    spread = Spread.of(ratios)
    return {
        "of": measure,
        "piece": piece,
        "pieces": spread.rounds,
        "median": spread.median,
        "low": spread.low,
        "high": spread.high,
        "interval": spread.interval,
    }
