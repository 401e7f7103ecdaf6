# SPDX-License-Identifier: Apache-2.0
"""Stage 2 on the real engine, beside the plain reference and beside vLLM without the plugin.

Each scenario runs on Model Runner V1 and V2, each with and without asynchronous scheduling, or on those of
them that `tests.helpers.kv_matrix` names.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.helpers.kv_cases import (
    QUESTION,
    alone,
    brief_crowd,
    corners,
    crowd,
    gate_cases,
    grid,
    replayed,
    resettable,
    texts,
    unpruned,
)
from tests.helpers.kv_matrix import ON, Runs, Verdicts
from tests.helpers.pictures import noise
from tests.reference import Request

# a scenario takes half a minute where two cores are free for it, and waits for those before it
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]

PROMPT = 189  # tokens of QUESTION with one image of 144
SHORTER = 165  # with 120 of them


def on(scenario: str) -> Any:
    """Runs a test on every runner that the scenario runs on."""
    return pytest.mark.parametrize("runner", ON[scenario])


def test_judging_is_answering(verdicts: Verdicts) -> None:
    """The fast form of the reference agrees with the one that generates token by token."""
    reference = verdicts.reference(2)
    request = next(r for r in grid() if r.kv_keep == 0.25)
    answer = reference.answer(request)
    judged = reference.judge(request, answer.token_ids)
    assert judged.token_ids == answer.token_ids
    assert judged.logprobs == pytest.approx(answer.logprobs, abs=1e-5)


@on("grid")
def test_the_runner_is_the_one_asked_for(runs: Runs, runner: str) -> None:
    """Otherwise everything below would be said of another."""
    version, _, scheduling = runner.partition("-")
    assert runs("grid", runner)["runner"] == {
        "v2": version == "v2",
        "scheduler": "AsyncKVDropScheduler" if scheduling else "KVDropScheduler",
        "steps_ahead": 2 if scheduling else 1,
    }


@on("grid")
def test_a_mixed_batch_answers_as_the_reference(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    verdicts.check("grid", runner, 2, grid(), runs("grid", runner)["batch"])


@on("grid")
def test_a_request_alone_answers_as_the_reference(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    verdicts.check("one at a time", runner, 2, alone(), runs("grid", runner)["single"])


def test_dropping_changes_answers(runs: Runs) -> None:
    """Otherwise the comparisons above would prove nothing."""
    answers = runs("grid", ON["grid"][0])["batch"][:10]
    assert len({tuple(a["tokens"]) for a in answers}) == 9  # kv_keep 1.0 in both scopes is the same request


@on("top")
def test_the_layer_at_the_top_compiled_halves_and_ungrouped_heads(
    runs: Runs, runner: str, verdicts: Verdicts
) -> None:
    found = runs("top", runner)
    assert found["compiled"] != "NONE"
    verdicts.check("top", runner, 5, grid(), found["batch"], checkpoint="ungrouped")


@on("tensor_parallel")
def test_tensor_parallel_ranks_keep_the_same_tokens(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    verdicts.check("tensor_parallel", runner, 2, corners(), runs("tensor_parallel", runner)["batch"])


@on("tensor_parallel")
def test_tensor_parallel_ranks_decide_alike_at_a_gate(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("tensor_parallel", runner)["gated"]
    assert {answer["gate"] for answer in found} == {True, False, None}
    verdicts.check("a gate, tensor parallel", runner, 2, gate_cases(), found, gate=True)


@on("preemption")
def test_preempted_requests_lose_the_same_tokens(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("preemption", runner)
    assert found["preemptions"] >= 3
    assert found["blocks_lost"] == 0
    verdicts.check("preemption", runner, 1, crowd(), found["answers"], "last_token")


@on("grid")
def test_what_is_preempted_may_be_aborted_or_resume(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("grid", runner)["crowd"]
    assert found["preemptions"] >= 2 and found["aborted"] == 1
    assert found["plans_left"] == 0
    verdicts.check("aborted while preempted", runner, 2, brief_crowd(), found["answers"])


@on("grid")
def test_a_reset_of_the_prefix_cache_changes_no_answer(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    """Requests are preempted and resume in one step; an unpruned one in their midst is none the worse."""
    found = runs("grid", runner)["reset"]
    assert found["preemptions"] >= 2 * len(resettable()) - 2
    assert found["plans_left"] == 0
    verdicts.check("reset while running", runner, 2, resettable(), found["answers"])


@on("grid")
def test_a_reset_and_an_abort_before_the_next_step(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("grid", runner)["reset_abort"]
    assert found["plans_left"] == 0
    verdicts.check("reset, then abort", runner, 2, resettable(), found["answers"])


@on("grid")
def test_dummy_runs_between_steps_change_no_answer(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    """Warm-up of vLLM's kernels, its memory profile, and dummy batches beside other data-parallel ranks."""
    found = runs("grid", runner)["dummy_runs"]
    assert found["rated"] == [1024], "the profile rates the costliest batch of a step, once"
    assert "would not reach the vision tower" in found["reload"]
    verdicts.check("dummy runs between", runner, 2, resettable(), found["answers"])


@on("grid")
def test_a_sleep_that_loses_device_memory_changes_no_answer(
    runs: Runs, runner: str, verdicts: Verdicts
) -> None:
    verdicts.check("asleep", runner, 2, unpruned()[:2] * 2, runs("grid", runner)["asleep"])


@on("grid")
def test_a_session_that_grows_is_served_whole(runs: Runs, runner: str) -> None:
    """A streaming-input session with kv_keep answers its second chunk as its whole prompt, asked at once."""
    found = runs("grid", runner)["session"]
    assert [len(tokens) for tokens in found["told"]] == [8, 8]
    assert found["told"][1] == found["whole"]


@on("grid")
def test_a_disagreement_fails_one_request_and_touches_no_other(
    runs: Runs, runner: str, verdicts: Verdicts
) -> None:
    """The worker was made to forget two prunings: it has more tokens than the scheduler gave blocks for."""
    answers = runs("grid", runner)["overrun"]["answers"]
    assert [i for i, a in enumerate(answers) if a["finish"] == "error"] == [3, 4]
    assert len(answers[3]["tokens"]) < 10 and not answers[4]["tokens"]
    others = [None if i in (3, 4) else a for i, a in enumerate(answers)]
    verdicts.check("a disagreement beside them", runner, 2, resettable(), others)


@pytest.mark.parametrize("runner", [r for r in ON["grid"] if r.startswith("v2")])
def test_decode_batches_replay_full_graphs(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    """CUDA graphs acted out: what is not written in place does not reach the layers above."""
    found = runs("grid", runner)["graphs"]
    assert found["replays"] > 100 and found["preemptions"] >= 2
    verdicts.check("full graphs", runner, 2, replayed(), found["answers"])
    for right, wrong in zip(found["answers"][:2], found["not_in_place"], strict=True):
        assert right["tokens"] != wrong["tokens"]


@pytest.mark.parametrize("runner", [r for r in ON["grid"] if r.startswith("v2")])
def test_scored_prompt_tokens_are_all_there(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    """`prompt_logprob_token_ids` reads every prompt row: no default drops any, and kv_keep is refused."""
    found = runs("grid", runner)["token_ids"]
    assert "leave prompt_logprob_token_ids out, or kv_keep" in found["refused"]
    expected = verdicts.reference(2).prompt_logprobs(Request(QUESTION, (noise(0),)))
    start = found["start"]
    for scores in (found["default"], found["whole"]):
        np.testing.assert_allclose(scores, expected[start : PROMPT - 1, 5:8], atol=1e-4)


@on("capacity")
def test_relevance_without_rotary_embedding(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    requests = [r for r in corners() if len(r.images) == 1]
    verdicts.check("capacity", runner, 2, requests, runs("capacity", runner)["answers"], "no_rope")
    for request in requests:
        if request.kv_keep == 0.25 and request.kv_scope == "all":
            without = verdicts.reference(2, "no_rope").judge(request, [0]).kept
            assert verdicts.reference(2).judge(request, [0]).kept != without


@on("no_layer")
def test_unpruned_requests_are_bit_equal_to_an_engine_without_a_layer(runs: Runs, runner: str) -> None:
    with_layer, without = runs("grid", runner)["unpruned"], runs("no_layer", runner)["unpruned"]
    assert [(a["tokens"], a["logprobs"]) for a in with_layer] == [
        (a["tokens"], a["logprobs"]) for a in without
    ]


@on("plain")
def test_unpruned_text_is_bit_equal_to_vllm_without_the_plugin(runs: Runs, runner: str) -> None:
    """Pictures go through the plugin's tower, which equals vLLM's to rounding only."""
    ours, vllms = runs("grid", runner)["unpruned"], runs("plain", runner)["unpruned"]
    for request, mine, theirs in zip(unpruned(), ours, vllms, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        if not request.images:
            assert mine["logprobs"] == theirs["logprobs"]


@on("text_only")
def test_text_alone_is_embedded_where_graphs_read(runs: Runs, runner: str, verdicts: Verdicts) -> None:
    found = runs("text_only", runner)
    assert found["addresses"] == 1
    verdicts.check("text only", runner, 2, texts(), found["answers"])


@on("no_layer")
def test_without_a_layer_nothing_of_stage_2_is_loaded(runs: Runs, runner: str) -> None:
    found = runs("no_layer", runner)
    assert found["scheduler"].startswith("vllm.")
    assert found["worker"].startswith("vllm.")
    assert found["decoder"] == "vllm.model_executor.models.llama"


@on("grid")
def test_blocks_are_those_of_the_budget_and_all_return(runs: Runs, runner: str) -> None:
    pool = runs("grid", runner)["pool"]
    size = pool["block_size"]
    kept = -(-PROMPT // 4)
    for held in pool["held"]:
        for group, blocks in zip(pool["groups"], held, strict=True):
            tokens = kept if group == "AbovePruneLayerSpec" else PROMPT
            # up to 8 tokens were generated on top
            assert -(-tokens // size) <= blocks <= -(-(tokens + 8) // size)
    assert pool["groups"] == ["BelowPruneLayerSpec", "AbovePruneLayerSpec", "AbovePruneLayerSpec"]
    assert pool["before"] - pool["during"] == sum(map(sum, pool["held"]))
    assert pool["after"] == pool["before"]
    assert runs("grid", runner)["blocks_lost"] == 0


@on("grid")
def test_as_many_requests_run_at_once_as_the_counts_predict(runs: Runs, runner: str) -> None:
    found = runs("grid", runner)
    for keep, running in found["running"].items():
        kept = -(-SHORTER * keep // 1)
        per_request = -(-SHORTER // 32) + 2 * -(-kept // 32)
        # a whole prompt may be split, and begun in what is left
        assert 0 <= running - found["free"] // per_request <= (keep == 1.0), keep


@on("grid")
def test_prefix_caching_is_untouched_by_pruned_requests(runs: Runs, runner: str) -> None:
    ours, vllms = runs("grid", runner)["traffic"], runs("plain", "v1")["traffic"]
    assert ours["cached"] == vllms["cached"]
    assert any(ours["cached"])
    assert (ours["hits"], ours["queries"]) == (vllms["hits"], vllms["queries"])


@on("grid")
def test_n_completions_drop_alike(runs: Runs, runner: str) -> None:
    first, *others = [a["tokens"] for a in runs("grid", runner)["n3"]]
    assert others == [first, first]
    assert first == runs("grid", runner)["batch"][6]["tokens"]


@on("grid")
def test_structured_output(runs: Runs, runner: str) -> None:
    assert runs("grid", runner)["choice"]["text"] in ("yes", "no")


def test_what_cannot_be_served_is_refused_in_a_sentence(runs: Runs) -> None:
    logprobs, text, number, unknown = runs("grid", ON["grid"][0])["refused"]
    assert "leave prompt_logprobs out, or kv_keep" in logprobs
    assert "build it with vllm_vtprune.request_kwargs" in text
    assert "kv_keep must be a number in [0, 1]" in number
    assert "extra_args.vtprune.x" in unknown


@on("grid")
def test_a_prompt_too_long_for_a_step_is_served_whole_and_counted(runs: Runs, runner: str) -> None:
    found = runs("grid", runner)
    assert found["too_long"][0]["prompt_tokens"] == 1010
    # beside a long prompt that is chunked, a pruned one is still taken whole
    assert found["too_long"][1]["tokens"] == found["batch"][6]["tokens"]
    assert found["unpruned_reasons"] == {"too_long": 1}


@on("grid")
def test_aborted_requests_leave_no_plan(runs: Runs, runner: str) -> None:
    assert runs("grid", runner)["plans_left"] == 0
