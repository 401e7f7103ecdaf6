# SPDX-License-Identifier: Apache-2.0
"""Several prune layers on the real engine, beside the plain reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import random_llava
from tests.helpers.kv_cases import band_cases, band_crowd
from tests.helpers.kv_process import run_scenario
from tests.helpers.kv_run import BANDS
from tests.reference import Reference, Request
from vllm_vtprune.kv_drop.schedule import parse

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

PROMPT = 189  # tokens of a question with one image of 144
Scenario = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava(
        tmp_path_factory.mktemp("llava"),
        decoder="qwen3",
        layers=6,
        heads=4,
        kv_heads=2,
        weight_scale=5.0,
        seed=3,
    )


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    @cache
    def scenario(name: str) -> dict[str, Any]:
        return run_scenario(name, checkpoint, tmp_path_factory.mktemp(name) / "out.pt", {})

    return scenario


def reference(checkpoint: Path, scenario: str) -> Reference:
    """The method with the scenario's prune layers and ratings."""
    prune_layers = tuple((p.layer, p.share, p.of) for p in parse(BANDS[scenario]["prune_layers"]))
    return Reference(checkpoint, prune_layers, relevance=tuple(BANDS[scenario]["relevance"].split(",")))


def wrong(theirs: Reference, requests: Sequence[Request], answers: Sequence[dict[str, Any]]) -> list[int]:
    """Requests whose tokens differ, or whose log-probabilities do by more than 1e-4."""
    found = []
    for number, (request, mine) in enumerate(zip(requests, answers, strict=True)):
        judged = theirs.judge(request, mine["tokens"])
        close = mine["logprobs"] == pytest.approx(judged.logprobs, abs=1e-4)
        if mine["tokens"] != judged.token_ids or not close:
            found.append(number)
    return found


def test_a_mixed_batch_answers_as_the_reference(run: Scenario, checkpoint: Path) -> None:
    assert wrong(reference(checkpoint, "bands"), band_cases(), run("bands")["batch"]) == []


def test_a_request_alone_answers_as_the_reference(run: Scenario, checkpoint: Path) -> None:
    assert wrong(reference(checkpoint, "bands"), band_cases()[:6], run("bands")["single"]) == []


def test_each_prune_layer_changes_answers(run: Scenario, checkpoint: Path) -> None:
    """Otherwise the comparisons would prove little: without the higher ones most answers are others."""
    lowest_alone = reference(checkpoint, "bands")
    lowest_alone.prune_layer = lowest_alone.prune_layer[:1]  # type: ignore[index]
    requests = [replace(r, kv_keep=r.kv_keep if r.kv_keep != 0.999 else 1.0) for r in band_cases()]
    assert len(wrong(lowest_alone, requests, run("bands")["batch"])) >= 5


def test_preempted_requests_lose_the_same_tokens(run: Scenario, checkpoint: Path) -> None:
    found = run("bands_preemption")
    assert found["preemptions"] >= 2
    assert found["blocks_lost"] == 0
    assert wrong(reference(checkpoint, "bands_preemption"), band_crowd(), found["answers"]) == []


def test_compiled_bands_and_other_ratings_answer_as_the_reference(run: Scenario, checkpoint: Path) -> None:
    found = run("bands_compiled")
    layers = [2, 1, 1, 1, 1]
    assert found["bands"] == ("Qwen3Model", [(f"Band{i}", n, True) for i, n in enumerate(layers)])
    assert wrong(reference(checkpoint, "bands_compiled"), band_cases(), found["batch"]) == []


def test_blocks_are_those_of_each_bands_count_and_all_return(run: Scenario) -> None:
    pool = run("bands")["pool"]
    size = pool["block_size"]
    # with an exit all text stays: half of the prompt, a quarter, and the text alone
    kept = [PROMPT, 95, 48, 45]
    for held in pool["held"]:
        for band, blocks in zip(pool["bands"], held, strict=True):
            # up to 8 tokens were generated on top
            assert -(-kept[band] // size) <= blocks <= -(-(kept[band] + 8) // size)
    # bands of 2, 1, 2 and 1 layers, and groups of one
    assert sorted(pool["bands"]) == [0, 0, 1, 2, 2, 3]
    assert pool["before"] - pool["during"] == sum(map(sum, pool["held"]))
    assert pool["after"] == pool["before"]
    assert run("bands")["blocks_lost"] == 0
