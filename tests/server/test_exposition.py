# SPDX-License-Identifier: Apache-2.0
"""The metrics of several processes in one exposition."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vtprune_server.exposition import UP, merged

Sample = tuple[str, tuple[tuple[str, str], ...], float]


def exposition(number: int) -> str:
    registry = CollectorRegistry()
    Counter("told", "A help text\nof two lines.", ["why"], registry=registry).labels('a "quoted}" one').inc(
        number
    )
    Gauge("bytes_kept", "Without labels.", registry=registry).set(number / 7)
    Histogram("seconds", "With buckets.", ["kind"], registry=registry).labels("x").observe(number)
    return generate_latest(registry).decode()


def samples(text: str) -> list[Sample]:
    return [
        (sample.name, tuple(sorted(sample.labels.items())), sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def test_every_sample_is_there_once_with_its_replica() -> None:
    texts = {"one": exposition(1), "two": exposition(2)}
    expected = [
        (name, tuple(sorted([*labels, ("replica", replica)])), value)
        for replica, text in texts.items()
        for name, labels, value in samples(text)
    ]
    joined = [sample for sample in samples(merged(dict(texts))) if sample[0] != UP]
    assert sorted(joined) == sorted(expected)


def test_a_family_is_described_once_before_its_samples() -> None:
    text = merged({"one": exposition(1), "two": exposition(2)})
    described = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(described) == len(set(described))
    families = {family.name: family.type for family in text_string_to_metric_families(text)}
    assert families["told"] == "counter" and families["seconds"] == "histogram"


def test_a_replica_that_did_not_answer_is_said_to_be_down() -> None:
    text = merged({"one": exposition(1), "two": None})
    assert [s for s in samples(text) if s[0] == UP] == [
        (UP, (("replica", "one"),), 1.0),
        (UP, (("replica", "two"),), 0.0),
    ]
