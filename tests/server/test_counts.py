# SPDX-License-Identifier: Apache-2.0
"""Counts of a server with several prune layers, and which turn of a conversation a request is."""

from __future__ import annotations

from types import SimpleNamespace

from vllm_vtprune.kv_drop.plan import KVDropConfig, PromptPlan
from vllm_vtprune.kv_drop.schedule import parse
from vtprune_server.counts import TokenCounts
from vtprune_server.kv_plan import KVPlanner
from vtprune_server.renderer import carries_an_answer


def test_prompts_of_a_request_add_up_layer_by_layer() -> None:
    counts = TokenCounts()
    counts.add(TokenCounts(10, 4, 20, 15, (15, 8)))
    counts.add(TokenCounts(0, 0, 5, 5, (5, 5)))
    assert counts == TokenCounts(10, 4, 25, 20, (20, 13))
    assert counts.as_usage()["kv_tokens_kept_by_layer"] == [20, 13]
    assert counts.as_headers()["X-VTPrune-KV-Tokens-Kept"] == "20"


def test_one_prune_layer_is_told_as_before() -> None:
    assert "kv_tokens_kept_by_layer" not in TokenCounts(10, 4, 20, 15, (15,)).as_usage()
    assert "kv_tokens_kept_by_layer" not in TokenCounts(10, 4, 20, 20).as_usage()


def test_what_leaves_at_any_layer_is_dropped() -> None:
    assert not TokenCounts(10, 10, 20, 20, (20, 20)).drops
    assert TokenCounts(10, 10, 20, 20, (20, 8)).drops
    assert TokenCounts(10, 9, 20, 20).drops


def test_a_prompt_that_is_served_whole_has_all_its_tokens_in_every_band() -> None:
    planner = KVPlanner(KVDropConfig(parse("2:0.5,4:0"), window=4, longest_prompt=100), 16, (1, 1))
    assert planner.by_layer(PromptPlan(30, 30, "too_long")) == (30, 30)
    assert planner.by_layer(PromptPlan(30, 15, kept_above=(5,))) == (15, 5)
    # what lies behind a first turn that was gone on from is whole
    assert planner.by_layer(PromptPlan(30, 15, kept_above=(5,), behind=20)) == (35, 25)


def test_an_answer_to_be_continued_is_no_earlier_one() -> None:
    user, assistant = {"role": "user", "content": "?"}, {"role": "assistant", "content": "red"}
    assert not carries_an_answer([user])
    assert not carries_an_answer([user, assistant])
    assert carries_an_answer([user, assistant, user])
    assert carries_an_answer([SimpleNamespace(role="assistant"), user])
    assert not carries_an_answer([])
