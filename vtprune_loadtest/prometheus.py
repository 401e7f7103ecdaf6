# SPDX-License-Identifier: Apache-2.0
"""The server's own counters, read before and after a phase."""

from collections.abc import Iterable

from prometheus_client.parser import text_string_to_metric_families

Counters = dict[str, float]
_HISTOGRAM_TOTALS = ("_sum", "_count")


def parse_counters(text: str) -> Counters:
    """Every counter, and every histogram's sum and count, by `name{label="value",...}`."""
    counters: Counters = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            is_counter = family.type == "counter" and not sample.name.endswith("_created")
            is_total = family.type in ("histogram", "summary") and sample.name.endswith(_HISTOGRAM_TOTALS)
            if is_counter or is_total:
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
                counters[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return counters


def counter_deltas(before: Counters, after: Counters) -> Counters:
    """What grew, by how much; a counter that appears only afterwards started at 0."""
    deltas = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return {name: delta for name, delta in deltas.items() if delta != 0}


def add_counters(deltas: Iterable[Counters]) -> Counters:
    """The sum over several phases."""
    total: Counters = {}
    for delta in deltas:
        for name, value in delta.items():
            total[name] = total.get(name, 0.0) + value
    return total
