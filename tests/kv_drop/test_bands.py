# SPDX-License-Identifier: Apache-2.0
"""Several prune layers on the real engine, beside the plain reference; each scenario on another decoder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.helpers.kv_cases import band_cases, band_crowd, gate_cases, gate_crowd
from tests.helpers.kv_matrix import CHECKPOINT, ON, Runs, Verdicts, band_layers
from tests.reference import Reference

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

PROMPT = 189  # tokens of a question with one image of 144


def on(scenario: str) -> Any:
    """Runs a test on every runner that the scenario runs on."""
    return pytest.mark.parametrize("runner", ON[scenario])


def check(
    verdicts: Verdicts,
    scenario: str,
    runner: str,
    requests: Any,
    answers: Any,
    name: str = "",
    gate: bool = False,
) -> None:
    """The answers are the reference's."""
    prune_layers, relevance = band_layers(scenario)
    checkpoint = CHECKPOINT[scenario]
    verdicts.check(name or scenario, runner, prune_layers, requests, answers, relevance, checkpoint, gate)


@on("bands")
def test_a_mixed_batch_answers_as_the_reference(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    check(verdicts, "bands", runner, band_cases(), runs("bands", runner)["batch"])


@on("bands")
def test_a_request_alone_answers_as_the_reference(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    alone = runs("bands", runner)["single"]
    check(verdicts, "bands", runner, band_cases()[:6], alone, "bands, one at a time")


@on("bands_preemption")
def test_preempted_requests_lose_the_same_tokens(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("bands_preemption", runner)
    assert found["preemptions"] >= 2
    assert found["blocks_lost"] == 0
    check(verdicts, "bands_preemption", runner, band_crowd(), found["answers"])


@on("bands_compiled")
def test_compiled_bands_and_other_ratings_answer_as_the_reference(
    runs: Runs, runner: str, verdicts: Verdicts
) -> None:
    check(verdicts, "bands_compiled", runner, band_cases(), runs("bands_compiled", runner)["batch"])


@pytest.mark.parametrize("runner", [r for r in ON["bands_compiled"] if r.startswith("v2")])
def test_prompts_replay_piecewise_graphs(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    """The runner finds compiled bands: the lowest replays in a step that prunes, all of them otherwise."""
    found = runs("bands_compiled", runner)["piecewise"]
    assert found["seen"]
    assert found["replays"][0] > 0 and found["decodes"] > 0
    check(verdicts, "bands_compiled", runner, band_cases(), found["answers"], "piecewise graphs")


@on("bands_compiled")
def test_a_weight_has_the_name_it_has_in_the_checkpoint_and_no_other(runs: Runs, runner: str) -> None:
    weights = runs("bands_compiled", runner)["weights"]
    assert len(weights["names"]) == weights["tensors"] > 0
    assert set(weights["names"]) <= set(weights["state"])
    assert not [name for name in weights["state"] if "band" in name]


def test_each_prune_layer_changes_answers(runs: Runs, verdicts: Verdicts) -> None:
    """Otherwise the comparisons would prove little: without the higher ones other answers are right."""
    (prune_layers, relevance), checkpoint = band_layers("bands"), CHECKPOINT["bands"]
    lowest_alone: Reference = verdicts.reference(prune_layers[:1], relevance, checkpoint)
    wrong = 0
    for request, mine in zip(band_cases(), runs("bands", ON["bands"][0])["batch"], strict=True):
        # a share of almost one takes the schedule's, of which the lowest has none
        same = replace(request, kv_keep=1.0) if request.kv_keep == 0.999 else request
        wrong += lowest_alone.judge(same, mine["tokens"]).token_ids != mine["tokens"]
    assert wrong >= 5


@pytest.mark.parametrize(
    ("scenario", "decoder", "layers"),
    [
        ("bands", "Qwen3Model", [2, 1, 2, 1]),
        ("bands_preemption", "MistralModel", [2, 2, 2]),
        ("bands_compiled", "Qwen2Model", [2, 1, 1, 1, 1]),
    ],
)
def test_the_decoder_is_vllms_own_in_bands(
    runs: Runs, scenario: str, decoder: str, layers: list[int]
) -> None:
    compiled = scenario == "bands_compiled"
    bands = [(f"Band{index}", count, compiled) for index, count in enumerate(layers)]
    assert runs(scenario, ON[scenario][0])["decoder"] == (decoder, bands)


@on("bands")
def test_blocks_are_those_of_each_bands_count_and_all_return(runs: Runs, runner: str) -> None:
    pool = runs("bands", runner)["pool"]
    size = pool["block_size"]
    # with an exit all text stays: half of the prompt, a quarter, and the text alone
    kept = [PROMPT, 95, 48, 45]
    for held in pool["held"]:
        for band, blocks in zip(pool["bands"], held, strict=True):
            # up to 8 tokens were generated on top
            assert -(-kept[band] // size) <= blocks <= -(-(kept[band] + 8) // size)
    # bands of 2, 1, 2 and 1 layers, in groups of one
    assert sorted(pool["bands"]) == [0, 0, 1, 2, 2, 3]
    assert pool["before"] - pool["during"] == sum(map(sum, pool["held"]))
    assert pool["after"] == pool["before"]
    assert runs("bands", runner)["blocks_lost"] == 0


def decided(answers: list[dict[str, Any]]) -> tuple[int, int, int]:
    """How many requests lost their visual tokens to the gate, kept them, and were not asked."""
    found = [answer["gate"] for answer in answers]
    return found.count(True), found.count(False), found.count(None)


@on("bands")
def test_a_gate_decides_and_answers_as_the_reference(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("bands", runner)
    left, stayed, not_asked = decided(found["gated"])
    assert left >= 3 and stayed >= 3 and not_asked == 5
    check(verdicts, "bands", runner, gate_cases(), found["gated"], "a gate", gate=True)
    check(verdicts, "bands", runner, gate_cases()[:4], found["gated_single"], "a gate, alone", gate=True)


@on("bands_compiled")
def test_a_gate_between_compiled_bands(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("bands_compiled", runner)["gated"]
    assert decided(found)[0] >= 3
    check(verdicts, "bands_compiled", runner, gate_cases(), found, "a gate, compiled", gate=True)


@on("bands_preemption")
def test_a_preempted_request_keeps_the_gates_decision(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    """Of the first one worker and scheduler count the same blocks, though its decision came late."""
    found, answers = (
        runs("bands_preemption", runner)["gated_crowd"],
        runs("bands_preemption", runner)["gated"],
    )
    late = {"leaves": True, "running": True, "heard": True} if runner.endswith("async") else None
    assert found["late"] == late
    assert found["preemptions"] >= 3
    assert decided(answers)[0] >= 3 and decided(answers)[1] >= 3
    assert found["beyond"] == {0} and found["plans_left"] == 0
    check(verdicts, "bands_preemption", runner, gate_crowd(), answers, "a gate, preempted", gate=True)


@on("bands_preemption")
def test_a_reset_while_a_gate_decides(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    """Requests are preempted, and may have resumed, before the scheduler hears what was decided on them."""
    found = runs("bands_preemption", runner)["gated_reset"]
    assert found["preemptions"] >= 5
    check(verdicts, "bands_preemption", runner, gate_crowd(), found["answers"], "a gate, reset", gate=True)
    assert found["again"] == (True, True)
    late = found["late"]
    if runner.endswith("async"):
        assert late.pop("again") == {"leaves": True, "running": True, "heard": True}
        # every decision was met in flight, and none was lost
        asked = {f"late-{i}": a["gate"] for i, a in enumerate(found["answers"]) if a["gate"] is not None}
        assert {name: told["leaves"] for name, told in late.items()} == asked
        assert all(told["heard"] for told in late.values())
        waiting = {told["leaves"] for told in late.values() if not told["running"]}
        assert waiting == {True, False}
        assert found["aborted"] == 1
    else:
        # a step's decisions are known once it is done
        assert not late and not found["aborted"]
    assert found["beyond"] == {0} and found["unheard"] == found["plans_left"] == 0


@on("bands")
def test_what_a_gate_lets_leave_returns_to_the_pool_after_the_prompts_step(runs: Runs, runner: str) -> None:
    """By the block pool's own counts; and nothing was written to what returned."""
    found, layer = runs("bands", runner)["exits"], 1  # of its three prune layers the gate is at the second
    size, returned = found["block_size"], 0
    for case in found["cases"]:
        turns = case["turns"]
        assert all(sum(held) == found["free"] - free for _, held, free in turns)
        assert turns[-1][2] == found["free"]
        (first, at_admission, _), (second, after, _) = turns[:2]
        assert (first, second) == ("scheduled", "stepped")
        for band, before, now in zip(found["bands"], at_admission, after, strict=True):
            if band <= layer or case["written"] is None:
                assert now == before
            else:
                assert now == -(-45 // size) <= before  # the text
        if case["written"] is not None:
            returned += sum(at_admission) - sum(after)
            assert case["written"] == 0
    assert returned > 0
    assert {case["written"] for case in found["cases"]} == {0, None}
