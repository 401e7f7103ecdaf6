# SPDX-License-Identifier: Apache-2.0
"""Conversations: what is asked, and what is said of the measurements. The server is another test's."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.conversations import ARMS, BOTH, STAGE_1, Held, Talk, has_cost, report, stops_paying


def test_each_turn_repeats_the_conversation_before_it() -> None:
    talk = Talk(turns=4, system=100, output=4, concurrency=1)
    turns = [talk.messages(turn, "data:,x") for turn in range(talk.turns)]
    for before, after in itertools.pairwise(turns):
        assert after[: len(before)] == before
        assert [message["role"] for message in after[len(before) :]] == ["assistant", "user"]
    assert len(turns[0][0]["content"]) == 100
    pictures = [part for message in turns[-1] for part in message["content"] if "image_url" in part]
    assert len(pictures) == 1
    assert Talk(2, 0, 4, 1).messages(0, "data:,x")[0]["role"] == "user"


@pytest.mark.parametrize(
    ("ratios", "stops", "cost"),
    [
        ([0.5, 0.9, 0.8], None, None),
        ([0.5, 1.5, 1.6], 2, 3),
        ([0.5, 1.5, 0.9], None, None),
        ([1.2, 1.1, 1.3], 1, 1),
        ([0.5, 0.9, 1.1], 3, None),
    ],
)
def test_the_turn_at_which_stage_2_stops_paying(
    ratios: list[float], stops: int | None, cost: int | None
) -> None:
    alone = [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [1.5, 1.5, 1.5]]
    both = [[wait * ratio for wait, ratio in zip(turns, ratios, strict=True)] for turns in alone]
    assert stops_paying(both, alone) == stops
    assert has_cost(both, alone) == cost


def test_the_report_names_the_turn() -> None:
    held = {arm: [Held((0.4, 0.1), 5.0)] * 3 for arm in ARMS}
    held[BOTH] = [Held((0.2, 0.15), 6.0)] * 3
    text = report(Talk(2, 0, 4, 2), held)
    assert "stage 2 on top of stage 1 stops paying at turn 2; it has saved more than it cost" in text
    assert "stage 2 alone never pays" in text
    assert all(arm in text for arm in (STAGE_1, "1.20 (1.20 to 1.20)"))
