# SPDX-License-Identifier: Apache-2.0
"""Each family on the real engine: beside vLLM without the plugin, and a plain transformers reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest

from tests.families.conftest import Checkpoint
from tests.helpers.engine_process import saved_by
from tests.helpers.family_cases import PRUNED, UNPRUNED
from tests.helpers.family_checkpoints import CHECKPOINTS
from tests.helpers.family_oracle import Oracle, Request

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

Run = Callable[[str], dict[str, Any]]
EVERYTHING = [*PRUNED, *UNPRUNED]


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
            *(str(checkpoint(name)), str(out), family.placeholder, str(family.room)),
            *family.other_modalities,
            out=out,
        )

    return answers


def check(oracle: Oracle, requests: Sequence[Request], answers: Sequence[dict[str, Any]]) -> None:
    """Same prompt length, same greedy tokens, log-probabilities within 1e-4."""
    for request, mine in zip(requests, answers, strict=True):
        theirs = oracle.judge(request, mine["tokens"])
        assert mine["prompt_tokens"] == theirs.prompt_tokens, request.text
        assert mine["tokens"] == theirs.token_ids, request.text
        assert mine["logprobs"] == pytest.approx(theirs.logprobs, abs=1e-4), request.text


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_vllm_alone_answers_as_the_reference(name: str, run: Run, oracle: Callable[[str], Oracle]) -> None:
    """Else the reference would not be one."""
    check(oracle(name), UNPRUNED, run(name)["alone"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_unpruned_answers_are_vllms_own(name: str, run: Run) -> None:
    ours = run(name)["mixed"][len(PRUNED) :]
    assert [a["tokens"] for a in ours] == [a["tokens"] for a in run(name)["alone"]]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_mixed_batch_that_is_chunked_and_preempted_answers_as_the_reference(
    name: str, run: Run, oracle: Callable[[str], Oracle]
) -> None:
    found = run(name)
    assert found["preemptions"] >= 1
    check(oracle(name), EVERYTHING, found["mixed"])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_prefix_cache_hits_answer_as_the_reference(
    name: str, run: Run, oracle: Callable[[str], Oracle]
) -> None:
    again = run(name)["again"]
    hits = [a for r, a in zip(EVERYTHING, again, strict=True) if a["cached"] and r in PRUNED]
    assert len(hits) >= 3  # a prompt of less than a block has none
    check(oracle(name), EVERYTHING, again)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_pruning_changes_answers(name: str, run: Run) -> None:
    """Otherwise the comparisons above would prove little."""
    whole = {r.text: a["tokens"] for r, a in zip(UNPRUNED, run(name)["alone"], strict=True)}
    pruned = zip(PRUNED, run(name)["mixed"], strict=False)
    changed = sum(answer["tokens"] != whole[request.text] for request, answer in pruned)
    assert changed > len(PRUNED) // 2


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_engine_holds_no_tower(name: str, run: Run) -> None:
    model = run(name)["model"]
    assert model["class"].startswith("Pruned")
    assert model["tower_parameters"] == []
    assert model["deepstack"] is None or model["deepstack"] is True
