# SPDX-License-Identifier: Apache-2.0
"""How many prompt tokens stay: properties of the one function that scheduler, worker and front end share."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtprune.kv_drop.plan import (
    KVDropConfig,
    PromptPlan,
    kv_tokens_kept,
    plan_prompt,
    protected_positions,
    settings_of,
    tokens_kept,
)
from vllm_vtprune.settings import KVSettings

SPECIAL = frozenset({0, 1, 2})
IMAGE = 3
CONFIG = KVDropConfig(prune_layer=2, window=4, longest_prompt=500, special_ids=SPECIAL)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]]]:
    """Text with special tokens and stray placeholder ids, and images in it."""
    ids: list[int] = []
    images = []
    for _ in range(draw(st.integers(0, 3))):
        ids += draw(st.lists(st.integers(0, 9), max_size=12))
        length = draw(st.integers(1, 40))
        images.append((len(ids), length))
        ids += [IMAGE] * length
    ids += draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    return ids, images


shares = st.integers(1, 1000).map(lambda thousandths: thousandths / 1000)
settings = st.builds(KVSettings, keep=shares, scope=st.sampled_from(["all", "vision"]))
windows = st.integers(1, 12)


@given(prompts(), settings, windows)
def test_the_count_is_the_share_or_the_protected(prompt, kv, window):
    ids, images = prompt
    inside = {i for offset, length in images for i in range(offset, offset + length)}
    protected = {
        i
        for i, token in enumerate(ids)
        if i == 0
        or i >= len(ids) - window
        or (i not in inside and (kv.scope == "vision" or token in SPECIAL))
    }
    mask = protected_positions(ids, images, SPECIAL, kv, window)
    assert {i for i, stays in enumerate(mask) if stays} == protected
    expected = max(math.ceil(Decimal(str(kv.keep)) * len(ids)), len(protected))
    assert kv_tokens_kept(ids, images, SPECIAL, kv, window) == min(len(ids), expected)


@given(prompts(), settings, shares, windows)
def test_a_larger_share_never_keeps_fewer(prompt, kv, other, window):
    ids, images = prompt
    low, high = sorted([kv.keep, other])
    few, many = (kv_tokens_kept(ids, images, SPECIAL, replace(kv, keep=k), window) for k in (low, high))
    assert 1 <= few <= many <= len(ids)


@given(prompts(), shares, windows)
def test_protecting_text_never_keeps_fewer(prompt, keep, window):
    ids, images = prompt
    both, vision = (
        kv_tokens_kept(ids, images, SPECIAL, KVSettings(keep, scope), window) for scope in ("all", "vision")
    )
    assert both <= vision


@given(prompts(), windows)
def test_one_keeps_everything(prompt, window):
    ids, images = prompt
    assert kv_tokens_kept(ids, images, SPECIAL, KVSettings(1.0), window) == len(ids)


def test_text_that_spells_the_placeholder_is_text():
    ids = [1, IMAGE, 7, *[IMAGE] * 20, 7, 7]
    mask = protected_positions(ids, [(3, 20)], SPECIAL, KVSettings(0.1, "vision"), 1)
    assert mask[1] and not mask[3]


@pytest.mark.parametrize(
    ("share", "tokens", "kept"), [(0.07, 100, 7), (0.1, 30, 3), (0.3, 10, 3), (0.29, 100, 29)]
)
def test_a_share_is_the_decimal_it_is_written_as(share, tokens, kept):
    assert tokens_kept(tokens, 0, KVSettings(share)) == kept


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"token_ids": [5] * 501}, "too_long"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"has_prompt_embeds": True}, "prompt_embeds"),
        ({"token_ids": None, "num_tokens": 40}, "prompt_embeds"),
        ({"streaming_input": True}, "streaming_input"),
    ],
)
def test_what_cannot_be_pruned_is_served_whole_with_the_reason(arguments, reason):
    given_ = {"token_ids": [5] * 40, "placeholders": [], "settings": KVSettings(0.5), "config": CONFIG}
    plan = plan_prompt(**{**given_, **arguments})
    assert (plan.unpruned, plan.dropped) == (reason, 0)
    # who asks for everything is given it, and nothing needs a reason
    asked_all = plan_prompt(**{**given_, **arguments, "settings": KVSettings(1.0)})
    assert (asked_all.unpruned, asked_all.dropped) == (None, 0)


def test_the_longest_prompt_is_still_pruned():
    plan = plan_prompt([5] * 500, [], KVSettings(0.5), CONFIG)
    assert plan == PromptPlan(500, 250)


@pytest.mark.parametrize(
    "entry", ["0.5", 0.5, [], {"kv_keep": "half"}, {"kv_keep": 0}, {"kv_keep": float("nan")}, {"keep": 0.5}]
)
def test_an_unreadable_entry_is_served_whole(entry):
    assert settings_of({"vtprune": entry}, KVSettings(0.5)) == (KVSettings(1.0), "bad_settings")


def test_no_entry_means_the_operators_default():
    assert settings_of(None, KVSettings(0.5)) == (KVSettings(0.5), None)
    assert settings_of({"other": 1}, KVSettings(0.5)) == (KVSettings(0.5), None)
    assert settings_of(KVSettings(0.25, "vision").extra_args(), KVSettings()) == (
        KVSettings(0.25, "vision"),
        None,
    )


@given(st.integers(1, 5000), st.data(), st.sampled_from([16, 32, 128]), st.integers(1, 5))
def test_blocks_saved(tokens, data, block, groups):
    kept = data.draw(st.integers(1, tokens))
    saved = PromptPlan(tokens, kept).blocks_saved(block, groups)
    assert saved == groups * (math.ceil(tokens / block) - math.ceil(kept / block))
