# SPDX-License-Identifier: Apache-2.0
"""Each family on the real engine: beside vLLM without the plugin, and a plain transformers reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from tests.families.conftest import Checkpoint, chosen
from tests.helpers.engine_process import saved_by
from tests.helpers.family_cases import PRUNED, UNPRUNED_VIDEO_FAMILY, VIDEO_FAMILIES, WITH_VIDEO, cases
from tests.helpers.family_checkpoints import CHECKPOINTS
from tests.helpers.family_oracle import Oracle, Request

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

Run = Callable[[str], dict[str, Any]]
#: Those left out share adapter and engine class with others: LLaVA-1.5 and InternVL's chat format.
ENGINES = chosen([name for name in CHECKPOINTS if name not in ("llava_siglip", "internvl")])
#: Those that run on the CPU in float32, so that they can be compared to the last digits.
EXACT = [name for name in ENGINES if name != "qwen3_5"]


@pytest.fixture(scope="module")
def oracle(checkpoint: Checkpoint) -> Callable[[str], Oracle]:
    return cache(lambda name: Oracle(checkpoint(name)))


@pytest.fixture(scope="module")
def run(
    checkpoint: Checkpoint, oracle: Callable[[str], Oracle], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A family's answers; one process each."""

    @cache
    def answers(name: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp(name) / "out.pt"
        family = oracle(name).family
        return saved_by(
            "tests.helpers.family_run",
            *(name, str(checkpoint(name)), str(out), family.placeholder, str(family.room)),
            *(() if name in (*VIDEO_FAMILIES, UNPRUNED_VIDEO_FAMILY) else family.other_modalities),
            out=out,
        )

    return answers


def everything(name: str) -> list[Request]:
    pruned, unpruned = cases(name)
    return [*pruned, *unpruned]


def check(oracle: Oracle, requests: Sequence[Request], answers: Sequence[dict[str, Any]]) -> None:
    """Same prompt length, same greedy tokens, log-probabilities within 1e-4."""
    for request, mine in zip(requests, answers, strict=True):
        theirs = oracle.judge(request, mine["tokens"])
        assert mine["prompt_tokens"] == theirs.prompt_tokens, request.text
        assert mine["tokens"] == theirs.token_ids, request.text
        assert mine["logprobs"] == pytest.approx(theirs.logprobs, abs=1e-4), request.text


@pytest.mark.parametrize("name", EXACT)
def test_vllm_alone_answers_as_the_reference(name: str, run: Run, oracle: Callable[[str], Oracle]) -> None:
    """Else the reference would not be one."""
    check(oracle(name), cases(name)[1], run(name)["alone"])


@pytest.mark.parametrize("name", EXACT)
def test_unpruned_answers_are_vllms_own(name: str, run: Run) -> None:
    ours = run(name)["mixed"][len(cases(name)[0]) :]
    assert [a["tokens"] for a in ours] == [a["tokens"] for a in run(name)["alone"]]


@pytest.mark.parametrize("name", EXACT)
def test_a_mixed_batch_that_is_chunked_and_preempted_answers_as_the_reference(
    name: str, run: Run, oracle: Callable[[str], Oracle]
) -> None:
    found = run(name)
    assert found["preemptions"] >= 1
    check(oracle(name), everything(name), found["mixed"])


@pytest.mark.parametrize("name", EXACT)
def test_prefix_cache_hits_answer_as_the_reference(
    name: str, run: Run, oracle: Callable[[str], Oracle]
) -> None:
    again, (pruned, unpruned) = run(name)["again"], cases(name)
    hits = [a for a in again[: len(pruned)] if a["cached"]]
    assert len(hits) >= 3  # a prompt of less than a block has none
    check(oracle(name), [*pruned, *unpruned], again)


@pytest.mark.parametrize("name", ENGINES)
def test_pruning_changes_answers(name: str, run: Run) -> None:
    """Otherwise the comparisons above would prove little."""
    pruned, unpruned = cases(name)
    whole = {r.text: a["tokens"] for r, a in zip(unpruned, run(name)["alone"], strict=True)}
    answers = zip(pruned, run(name)["mixed"], strict=False)
    changed = sum(answer["tokens"] != whole[request.text] for request, answer in answers)
    assert changed > len(pruned) // 2


@pytest.mark.parametrize("name", ENGINES)
def test_the_engine_holds_no_tower(name: str, run: Run) -> None:
    model = run(name)["model"]
    assert model["class"].startswith("Pruned")
    # but where videos may be asked for that pass through it as they are
    assert bool(model["tower_parameters"]) is (name == UNPRUNED_VIDEO_FAMILY)
    # a tower that is elsewhere must not switch it off where there is one
    assert model["deepstack"] is (name.startswith("qwen3_vl") if "qwen3" in name else None)


@pytest.mark.skipif("qwen3_5" not in ENGINES, reason="not among VTPRUNE_TEST_FAMILIES")
def test_a_hybrid_decoder_answers_as_the_reference_to_16_bits(
    run: Run, oracle: Callable[[str], Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3.5, whose Gated DeltaNet vLLM runs on the CPU in bfloat16 alone, by its tokens' log-probabilities.

    Positions without the gaps that dropped tokens leave do not pass.
    """
    judge = oracle("qwen3_5")

    def off() -> float:
        """Mean difference of log-probabilities, over all tokens of the answers to pruned prompts."""
        found = []
        for request, mine in zip(everything("qwen3_5"), run("qwen3_5")["mixed"], strict=True):
            theirs = judge.judge(request, mine["tokens"])
            assert mine["prompt_tokens"] == theirs.prompt_tokens
            if request in PRUNED:
                found += [abs(a - b) for a, b in zip(mine["logprobs"], theirs.answered, strict=True)]
        return sum(found) / len(found)

    true = off()
    monkeypatch.setattr(
        type(judge.family),
        "positions",
        lambda self, inputs, ids, stays: (torch.arange(int(stays.sum())).expand(3, -1), int(stays.sum())),
    )
    contiguous = off()
    assert true < 0.05 < contiguous, (true, contiguous)


@pytest.mark.skipif(UNPRUNED_VIDEO_FAMILY not in ENGINES, reason="not among VTPRUNE_TEST_FAMILIES")
def test_videos_pass_unpruned_with_vllms_own_answers(run: Run) -> None:
    """Alone, and beside a picture of which nothing is dropped."""
    found = run(UNPRUNED_VIDEO_FAMILY)
    for (theirs,), (mine,) in zip(found["videos_alone"], found["videos"], strict=True):
        assert mine["prompt_tokens"] == theirs["prompt_tokens"]
        assert mine["tokens"] == theirs["tokens"]
        assert mine["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)


@pytest.mark.skipif(UNPRUNED_VIDEO_FAMILY not in ENGINES, reason="not among VTPRUNE_TEST_FAMILIES")
def test_a_picture_beside_a_video_is_pruned_and_the_video_is_not(
    run: Run, oracle: Callable[[str], Oracle]
) -> None:
    found, family = run(UNPRUNED_VIDEO_FAMILY), oracle(UNPRUNED_VIDEO_FAMILY).family
    for request, (whole,), (pruned,) in zip(WITH_VIDEO, found["videos"], found["videos_pruned"], strict=True):
        lost = sum(
            int((~family.stays(family.preprocess([image]), 0, replace(request, keep_ratio=0.5))).sum())
            for image in request.images
        )
        assert pruned["prompt_tokens"] == whole["prompt_tokens"] - lost
        assert (pruned["tokens"] == whole["tokens"]) is (lost == 0)


@pytest.mark.skipif("qwen3_vl" not in ENGINES, reason="not among VTPRUNE_TEST_FAMILIES")
def test_embeddings_that_the_caller_gives_are_answered_as_the_picture_they_are_of(run: Run) -> None:
    picture, given = run("qwen3_vl")["given"]
    assert given["prompt_tokens"] == picture["prompt_tokens"]
    assert given["tokens"] == picture["tokens"]
    assert given["logprobs"] == pytest.approx(picture["logprobs"], abs=1e-4)
