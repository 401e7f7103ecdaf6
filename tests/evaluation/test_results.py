# SPDX-License-Identifier: Apache-2.0
"""The committed study belongs to the shipped model and the shipped presets."""

import json
from typing import Any

import pytest

from tests.conftest import DEMO_MODEL, REPOSITORY
from vllm_vtprune.contract import PRESETS
from vllm_vtprune.demo_model import PRUNE_LAYER
from vtprune_eval.report import dump
from vtprune_eval.study import SHARES, fingerprint
from vtprune_eval.transformers_backend import LocalModel


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    text = (REPOSITORY / "docs" / "evaluation" / "results.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def test_a_result_is_written_as_the_committed_one(results: dict[str, Any]) -> None:
    text = (REPOSITORY / "docs" / "evaluation" / "results.json").read_text(encoding="utf-8")
    assert dump(results) == text


def adaptive(results: dict[str, Any]) -> list[dict[str, Any]]:
    rows = results["adaptive"]["rows"][1:]  # the first is unpruned
    return [row for row in rows if row["setting"]["method"] == "inflection"]


def test_the_weights_are_the_shipped_ones(results: dict[str, Any]) -> None:
    assert results["model"]["sha256"] == fingerprint(LocalModel(str(DEMO_MODEL)))


def test_presets_and_prune_layer_are_those_it_chose(results: dict[str, Any]) -> None:
    assert results["presets"] == {name: PRESETS[name].aggressiveness for name in SHARES}
    assert results["prune_layer"] == PRUNE_LAYER


def test_the_presets_keep_what_they_are_calibrated_to(results: dict[str, Any]) -> None:
    kept = {row["setting"]["aggressiveness"]: row["share_kept"] for row in adaptive(results)}
    for name, share in SHARES.items():
        assert kept[PRESETS[name].aggressiveness] == pytest.approx(share, abs=0.02)


def test_the_rule_beats_random_choice_outside_the_interval(results: dict[str, Any]) -> None:
    rows = adaptive(results)
    assert len(rows) == len(SHARES)
    assert all(row["versus"]["random"]["difference"]["low"] > 0 for row in rows)
