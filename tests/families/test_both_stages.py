# SPDX-License-Identifier: Apache-2.0
"""Both stages where positions have three dimensions or placeholders hold text, beside the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.families.conftest import Checkpoint, chosen
from tests.helpers.engine_process import saved_by
from tests.helpers.family_stage2 import BothStagesOracle, cases
from tests.helpers.model_runner_v2 import environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

#: Family and model runner; all that have the second stage, on both, where VTPRUNE_TEST_FAMILIES says so.
RUNS = [("qwen2_5_vl", "v1"), ("qwen3_vl", "v2"), ("mistral3", "v1")]
if asked := [name for name in chosen(()) if name != "qwen3_5"]:
    RUNS = [(name, runner) for name in asked for runner in ("v1", "v2")]
Run = Callable[[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def run(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the engine answers; a process each."""

    @cache
    def found(name: str, runner: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp(name) / "out.pt"
        return saved_by(
            "tests.helpers.family_stage2",
            *(str(checkpoint(name)), str(out)),
            out=out,
            env={
                **environment(runner),
                "VLLM_PLUGINS": "vtprune",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            },
        )

    return found


@pytest.mark.parametrize(("name", "runner"), RUNS)
def test_both_stages_answer_as_the_reference(
    name: str, runner: str, run: Run, checkpoint: Checkpoint
) -> None:
    oracle = BothStagesOracle(checkpoint(name))
    asked = cases(oracle.family.prunes_videos)
    for request, mine in zip(asked, run(name, runner)["answers"], strict=True):
        theirs = oracle.judge(request, mine["tokens"])
        assert mine["prompt_tokens"] == theirs.prompt_tokens, request
        assert mine["tokens"] == theirs.token_ids, request
        assert mine["logprobs"] == pytest.approx(theirs.logprobs, abs=1e-4), request


@pytest.mark.parametrize(("name", "runner"), RUNS)
def test_the_second_stage_changes_answers(name: str, runner: str, run: Run) -> None:
    """Otherwise the comparison would prove little: the same prompt, whole and pruned."""
    whole, pruned, *_ = run(name, runner)["answers"]
    assert whole["tokens"] != pruned["tokens"]


@pytest.mark.parametrize(("name", "runner"), RUNS)
def test_the_bands_are_compiled(name: str, runner: str, run: Run) -> None:
    assert run(name, runner)["bands"] == [("Band0", 2, True), ("Band1", 1, True), ("Band2", 1, True)]
