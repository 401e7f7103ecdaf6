# SPDX-License-Identifier: Apache-2.0
"""Conversations: what is asked, and what is said of the measurements. The server is another test's."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.conversations import ARMS, BOTH, STAGE_1, Held, Talk, has_cost, report, stops_paying
from benchmarks.turns import Drops, Turn, conversation
from vtprune_eval.flops import CostShape

SHAPE = CostShape(0, 0, 0, 0, 0, 64, 128, 12, 64, 64, 100, 2)


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


FIXED = {"turns": 4, "question": 20, "answer": 30, "visual": 200, "block": 16, "system": 0}


def counted(arm: tuple[float, float, Drops]) -> list[float]:
    return [turn.flops(SHAPE, 3) for turn in conversation(arm, **FIXED)]


def test_only_what_is_new_is_counted_where_nothing_is_dropped() -> None:
    prompts = [200 + (turn + 1) * 20 + turn * 30 for turn in range(4)]
    held = [0, *((prompt + 30) // 16 * 16 for prompt in prompts[:-1])]
    expected = [Turn(n, n, cached, cached) for n, cached in zip(prompts, held, strict=True)]
    assert conversation((1.0, 1.0, Drops.EVERY), **FIXED) == expected
    flops = counted((1.0, 1.0, Drops.EVERY))
    # the last token's logits are wanted even where all before it is there
    assert all(0 < later < flops[0] / 3 for later in flops[1:])


def test_dropping_pays_for_the_whole_prompt_and_leaves_the_next_turn_nothing() -> None:
    stage_1 = counted((0.25, 1.0, Drops.EVERY))
    every = counted((0.25, 0.5, Drops.EVERY))
    first = counted((0.25, 0.5, Drops.FIRST))
    assert every[0] == first[0] < stage_1[0]
    assert all(dropping > alone for dropping, alone in zip(every[1:], stage_1[1:], strict=True))
    assert first[1] > every[1] > stage_1[1]
    assert first[2:] == stage_1[2:]


def test_going_on_from_what_was_kept_computes_what_is_new_over_fewer_tokens() -> None:
    turns = conversation((0.25, 0.5, Drops.REUSED), **FIXED)
    # 50 vision tokens and a question of 20, half of which leave, in whole blocks of 16
    assert turns[0] == Turn(70, 38, 0, 0)
    assert turns[1] == Turn(120, 88, 96, 64)
    assert {turn.prompt - turn.above for turn in turns} == {32}
    reused, stage_1 = (counted((0.25, keep, Drops.REUSED)) for keep in (0.5, 1.0))
    assert all(a < b for a, b in zip(reused, stage_1, strict=True))


def test_the_report_names_the_turn() -> None:
    held = {arm: [Held((0.4, 0.1), 5.0)] * 3 for arm in ARMS}
    held[BOTH] = [Held((0.2, 0.15), 6.0)] * 3
    text = report(Talk(2, 0, 4, 2), held)
    assert "stage 2 on top of stage 1 stops paying at turn 2; it has saved more than it cost" in text
    assert "stage 2 alone never pays" in text
    assert all(arm in text for arm in (STAGE_1, "1.20 (1.20 to 1.20)"))
