# SPDX-License-Identifier: Apache-2.0
"""Stage 2 on the real engine, beside the plain reference and beside vLLM without the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.helpers.checkpoints import random_llava
from tests.helpers.kv_cases import corners, crowd, grid, unpruned
from tests.reference import Reference, Request

# a scenario takes half a minute where two cores are free for it
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PROMPT = 189  # tokens of QUESTION with one image of 144
Scenario = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped-query attention, and weights large enough that attention is not uniform."""
    return random_llava(
        tmp_path_factory.mktemp("llava"), layers=6, heads=4, kv_heads=2, weight_scale=5.0, seed=3
    )


@pytest.fixture(scope="module")
def ungrouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many key-value heads as heads, as LLaVA-1.5 has."""
    return random_llava(
        tmp_path_factory.mktemp("ungrouped"), layers=6, heads=4, kv_heads=4, weight_scale=5.0, seed=4
    )


@pytest.fixture(scope="module")
def run(checkpoint: Path, ungrouped: Path, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """Runs a scenario of `kv_run` once, in a process of its own; `top` on the ungrouped checkpoint."""

    @cache
    def scenario(name: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp(name) / "out.pt"
        folder = ungrouped if name == "top" else checkpoint
        process = subprocess.run(
            [sys.executable, "-m", "tests.helpers.kv_run", name, str(folder), str(out)],
            # the flag makes vLLM compile with torch's eager backend: traced like any other, without inductor
            env={
                **os.environ,
                "VLLM_PLUGINS": "" if name == "plain" else "vtprune",
                "VLLM_CPU_CI_ENV": "1",
                # so small a model gains nothing from threads, which spin where cores are shared
                "OMP_NUM_THREADS": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            },
            cwd=REPOSITORY,
            capture_output=True,
            timeout=850,
        )
        assert process.returncode == 0, process.stderr.decode(errors="replace")[-4000:]
        result: dict[str, Any] = torch.load(out, weights_only=False)
        return result

    return scenario


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


def check(
    reference: Reference,
    layer: int,
    requests: Sequence[Request],
    answers: Sequence[dict[str, Any]],
    relevance: str = "attention",
) -> None:
    """Same prompt, same greedy tokens, log-probabilities within 1e-4."""
    reference.prune_layer, reference.relevance = layer, relevance
    for request, mine in zip(requests, answers, strict=True):
        theirs = reference.judge(request, mine["tokens"])
        assert mine["prompt_tokens"] == len(theirs.prompt_ids)
        assert mine["tokens"] == theirs.token_ids, request
        assert mine["logprobs"] == pytest.approx(theirs.logprobs, abs=1e-4), request


def test_judging_is_answering(reference: Reference) -> None:
    """The fast form of the reference agrees with the one that generates token by token."""
    reference.prune_layer, reference.relevance = 2, "attention"
    request = next(r for r in grid() if r.kv_keep == 0.25)
    answer = reference.answer(request)
    judged = reference.judge(request, answer.token_ids)
    assert judged.token_ids == answer.token_ids
    assert judged.logprobs == pytest.approx(answer.logprobs, abs=1e-5)


def test_a_mixed_batch_answers_as_the_reference(run: Scenario, reference: Reference) -> None:
    check(reference, 2, grid(), run("grid")["batch"])


def test_a_request_alone_answers_as_the_reference(run: Scenario, reference: Reference) -> None:
    check(reference, 2, corners(), run("grid")["single"])


def test_dropping_changes_answers(run: Scenario) -> None:
    """Otherwise the comparisons above would prove nothing."""
    answers = run("grid")["batch"][:10]
    assert len({tuple(a["tokens"]) for a in answers}) == 9  # kv_keep 1.0 in both scopes is the same request


def test_the_layer_at_the_top_compiled_halves_and_ungrouped_heads(run: Scenario, ungrouped: Path) -> None:
    assert run("top")["compiled"] != "NONE"
    check(Reference(ungrouped), 5, grid(), run("top")["batch"])


def test_tensor_parallel_ranks_keep_the_same_tokens(run: Scenario, reference: Reference) -> None:
    check(reference, 2, corners(), run("tensor_parallel")["batch"])


def test_preempted_requests_lose_the_same_tokens(run: Scenario, reference: Reference) -> None:
    found = run("preemption")
    assert found["preemptions"] >= 3
    assert found["blocks_lost"] == 0
    check(reference, 1, crowd(), found["answers"], "last_token")


def test_relevance_without_rotary_embedding(run: Scenario, reference: Reference) -> None:
    requests = [r for r in corners() if len(r.images) == 1]
    check(reference, 2, requests, run("capacity")["answers"], "no_rope")
    for request in requests:
        if request.kv_keep == 0.25 and request.kv_scope == "all":
            without = reference.judge(request, [0]).kept
            reference.relevance = "attention"
            assert reference.judge(request, [0]).kept != without


def test_unpruned_requests_are_bit_equal_to_an_engine_without_a_layer(run: Scenario) -> None:
    with_layer, without = run("grid")["unpruned"], run("no_layer")["unpruned"]
    assert [(a["tokens"], a["logprobs"]) for a in with_layer] == [
        (a["tokens"], a["logprobs"]) for a in without
    ]


def test_unpruned_text_is_bit_equal_to_vllm_without_the_plugin(run: Scenario) -> None:
    """Pictures go through the plugin's tower, which equals vLLM's to rounding only."""
    ours, vllms = run("grid")["unpruned"], run("plain")["unpruned"]
    for request, mine, theirs in zip(unpruned(), ours, vllms, strict=True):
        assert mine["tokens"] == theirs["tokens"]
        if not request.images:
            assert mine["logprobs"] == theirs["logprobs"]


def test_without_a_layer_nothing_of_stage_2_is_loaded(run: Scenario) -> None:
    found = run("no_layer")
    assert found["scheduler"].startswith("vllm.")
    assert found["worker"].startswith("vllm.")
    assert found["decoder"] == "vllm.model_executor.models.llama"


def test_blocks_are_those_of_the_budget_and_all_return(run: Scenario) -> None:
    pool = run("grid")["pool"]
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
    assert run("grid")["blocks_lost"] == 0


def test_as_many_requests_run_at_once_as_the_counts_predict(run: Scenario) -> None:
    found = run("capacity")
    for keep, running in found["running"].items():
        kept = -(-PROMPT * keep // 1)
        per_request = -(-PROMPT // 32) + 2 * -(-kept // 32)
        assert running == found["free"] // per_request, keep


def test_prefix_caching_is_untouched_by_pruned_requests(run: Scenario) -> None:
    ours, vllms = run("grid")["traffic"], run("plain")["traffic"]
    assert ours["cached"] == vllms["cached"]
    assert any(ours["cached"])
    assert (ours["hits"], ours["queries"]) == (vllms["hits"], vllms["queries"])


def test_n_completions_drop_alike(run: Scenario) -> None:
    first, *others = [a["tokens"] for a in run("grid")["n3"]]
    assert others == [first, first]
    assert first == run("grid")["batch"][6]["tokens"]


def test_structured_output(run: Scenario) -> None:
    assert run("grid")["choice"]["text"] in ("yes", "no")


def test_what_cannot_be_served_is_refused_in_a_sentence(run: Scenario) -> None:
    logprobs, text, number, unknown = run("grid")["refused"]
    assert "leave prompt_logprobs out, or kv_keep" in logprobs
    assert "build it with vllm_vtprune.request_kwargs" in text
    assert "kv_keep must be a number in (0, 1]" in number
    assert "extra_args.vtprune.x" in unknown


def test_a_prompt_too_long_for_a_step_is_served_whole_and_counted(run: Scenario) -> None:
    found = run("grid")
    assert found["too_long"][0]["prompt_tokens"] == 1010
    # beside a long prompt that is chunked, a pruned one is still taken whole
    assert found["too_long"][1]["tokens"] == found["batch"][6]["tokens"]
    assert found["unpruned_reasons"] == {"too_long": 1}


def test_aborted_requests_leave_no_plan(run: Scenario) -> None:
    assert run("grid")["plans_left"] == 0
