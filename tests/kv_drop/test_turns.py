# SPDX-License-Identifier: Apache-2.0
"""Later turns that go on from what the first one kept, on the real engine, beside the plain reference.

On Model Runner V1, and on V2 with asynchronous scheduling. The reference computes every turn from its first
token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from tests.helpers.kv_cases import TURNS_BLOCK as BLOCK
from tests.helpers.kv_cases import talks
from tests.helpers.kv_matrix import ON, Runs, Verdicts, band_layers
from tests.reference import Request

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1800),
    pytest.mark.parametrize("runner", ON["turns"]),
]


def check(
    verdicts: Verdicts,
    scenario: str,
    runner: str,
    asked: Sequence[Request],
    told: Sequence[dict[str, Any] | None],
) -> None:
    layers, relevance = band_layers("turns")
    verdicts.check(scenario, runner, layers, asked, told, relevance, block=BLOCK)


def edge(request: Request, tokens: int) -> int:
    """The last edge of a block that the next turn goes on from: an answer's last token is not computed."""
    return (tokens + request.max_tokens - 1) // BLOCK * BLOCK


def test_the_runner_is_the_one_asked_for(runs: Runs, runner: str) -> None:
    version, _, scheduling = runner.partition("-")
    scheduler = "AsyncKVDropScheduler" if scheduling else "KVDropScheduler"
    assert runs("turns", runner)["runner"] == {"v2": version == "v2", "scheduler": scheduler}


def test_every_turn_answers_as_the_reference(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("turns", runner)
    check(verdicts, "three turns", runner, *(list(itertools.chain(*found[key])) for key in ("asked", "told")))


def test_a_later_turn_computes_what_is_new(runs: Runs, runner: str) -> None:
    asked, told = (runs("turns", runner)[key] for key in ("asked", "told"))
    assert [answer["cached"] for answer in told[0]] == [0] * len(talks())
    for turn in (1, 2):
        before = [edge(r, a["prompt_tokens"]) for r, a in zip(asked[turn - 1], told[turn - 1], strict=True)]
        assert [answer["cached"] for answer in told[turn]] == before


def test_dropping_changes_the_later_answers(runs: Runs, runner: str) -> None:
    """Otherwise the comparison above would prove nothing: the first conversation's turns, and without it."""
    found = runs("turns", runner)["otherwise"]
    refused, _, shares, gone_on = (tuple(answer["tokens"]) for answer in found["told"][:4])
    assert len({refused, shares, gone_on}) == 3


def test_an_empty_cache_changes_no_answer(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    """The turn is computed from its first token, and drops what the first turn dropped."""
    found = runs("turns", runner)
    assert {answer["cached"] for answer in found["again"]} == {0}
    check(verdicts, "a third turn with an empty cache", runner, found["asked"][2], found["again"])


def test_a_turn_asked_twice_is_found(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("turns", runner)
    for request, answer in zip(found["asked"][2], found["at_last"], strict=True):
        assert answer["cached"] == (answer["prompt_tokens"] - 1) // BLOCK * BLOCK, request
    check(verdicts, "a third turn, twice", runner, found["asked"][2], found["at_last"])


def test_what_is_another_prompt_or_refuses_starts_over(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    """Refused, the same picture with another question, other shares; then what does go on."""
    found = runs("turns", runner)["otherwise"]
    cached = [answer["cached"] for answer in found["told"]]
    assert cached[:3] == [0, 0, 0]
    assert cached[3] == cached[4] == edge(talks()[0], found["asked"][3].first_turn)
    check(verdicts, "turns that do not go on", runner, found["asked"], found["told"])


def test_a_reset_under_running_turns_changes_no_answer(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("turns", runner)
    assert found["reset"]["preemptions"] >= 6 and found["reset"]["plans_left"] == 0
    check(verdicts, "turns, reset", runner, found["asked"][1][:6], found["reset"]["told"])


def test_preempted_and_aborted_turns(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("turns", runner)["preempted"]
    assert found["preemptions"] >= 2 and found["plans_left"] == 0
    told = [found["again"] if answer is None else answer for answer in found["told"]]
    check(verdicts, "turns, preempted and aborted", runner, found["asked"], told)


def test_every_block_returns(runs: Runs, runner: str) -> None:
    assert runs("turns", runner)["blocks_lost"] == 0
