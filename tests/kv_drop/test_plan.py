# SPDX-License-Identifier: Apache-2.0
"""How many prompt tokens stay: properties of the one function that scheduler, worker and front end share."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vtprune.kv_drop.plan import KVDropConfig, PromptPlan, plan_prompt, reuses, settings_of, settled_from
from vllm_vtprune.kv_drop.schedule import PruneLayer
from vllm_vtprune.kv_drop.shares import protected_positions, scope_of, shares_of, tokens_kept
from vllm_vtprune.settings import KVSettings

SPECIAL = frozenset({0, 1, 2})
IMAGE = 3
CONFIG = KVDropConfig((PruneLayer(2),), window=4, longest_prompt=500, special_ids=SPECIAL)


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


def kv_tokens_kept(ids, images, special_ids, kv, window) -> int:
    """Tokens above the only prune layer."""
    config = KVDropConfig((PruneLayer(2),), window, 10_000, special_ids)
    return plan_prompt(ids, images, kv, config).kept


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
    mask = protected_positions(ids, images, SPECIAL, kv.scope, window)
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
    mask = protected_positions(ids, [(3, 20)], SPECIAL, "vision", 1)
    assert mask[1] and not mask[3]


@pytest.mark.parametrize(
    ("share", "tokens", "kept"), [(0.07, 100, 7), (0.1, 30, 3), (0.3, 10, 3), (0.29, 100, 29)]
)
def test_a_share_is_the_decimal_it_is_written_as(share, tokens, kept):
    assert tokens_kept(tokens, 0, 0, [PruneLayer(2, share)]) == [kept]


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
    "entry", ["0.5", 0.5, [], {"kv_keep": "half"}, {"kv_keep": -1}, {"kv_keep": float("nan")}, {"keep": 0.5}]
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


@given(st.integers(1, 5000), st.data(), st.sampled_from([16, 32, 128]))
def test_blocks_saved(tokens, data, block):
    kept = sorted(data.draw(st.lists(st.integers(1, tokens), min_size=1, max_size=4)), reverse=True)
    groups = [data.draw(st.integers(1, 5)) for _ in kept]
    saved = PromptPlan(tokens, kept[0], kept_above=tuple(kept[1:])).blocks_saved(block, groups)
    whole = math.ceil(tokens / block)
    assert saved == sum(n * (whole - math.ceil(k / block)) for n, k in zip(groups, kept, strict=True))


prune_layers = st.lists(
    st.tuples(st.integers(0, 1000), st.sampled_from(["prompt", "vision"])), min_size=1, max_size=4
).map(lambda found: tuple(PruneLayer(i + 1, share / 1000, of) for i, (share, of) in enumerate(found)))
asked = st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=1, max_size=4)


@given(prompts(), prune_layers, asked, st.sampled_from(["all", "vision"]), windows)
def test_each_band_keeps_its_share_and_no_more_than_the_one_below(prompt, schedule, keep, scope, window):
    ids, images = prompt
    config = KVDropConfig(schedule, window, 10_000, SPECIAL)
    kv = KVSettings.of(keep, scope)
    plan = plan_prompt(ids, images, kv, config)
    n, visual = len(ids), sum(length for _, length in images)
    own = [*keep, *[keep[-1]] * 4][: len(schedule)]
    shares = [1 if r == 1 else min(r, p.share) for r, p in zip(own, schedule, strict=True)]
    units = ["vision" if r == 0 else p.of for r, p in zip(shares, schedule, strict=True)]
    counts_vision = any(u == "vision" and r < 1 for u, r in zip(units, shares, strict=True))
    protected = int(
        protected_positions(ids, images, SPECIAL, "vision" if counts_vision else scope, window).sum()
    )
    expected, left = [], n
    for share, unit in zip(shares, units, strict=True):
        wanted = math.ceil(Decimal(str(share)) * n)
        if unit == "vision":
            wanted = n - visual + math.ceil(Decimal(str(share)) * visual)
        if share < 1:
            left = min(left, max(wanted, protected))
        expected.append(left)
    assert list(plan.kept_by_layer) == (expected if min(keep) < 1 else [n])


@given(prompts(), windows)
def test_the_exit_leaves_the_text_and_the_window(prompt, window):
    ids, images = prompt
    config = KVDropConfig((PruneLayer(2), PruneLayer(4, 0.0, "vision")), window, 10_000, SPECIAL)
    plan = plan_prompt(ids, images, KVSettings(0.9), config)
    inside = {i for offset, length in images for i in range(offset, offset + length)}
    stays = [i for i in range(len(ids)) if i not in inside or i == 0 or i >= len(ids) - window]
    assert plan.kept_by_layer[-1] == len(stays)


def test_a_share_of_one_drops_nothing_whatever_the_schedule_says():
    schedule = (PruneLayer(2, 0.5), PruneLayer(4, 0.25))
    config = KVDropConfig(schedule, 4, 500, SPECIAL)
    ids = [5] * 100
    assert plan_prompt(ids, [], KVSettings(1.0), config).dropped == 0
    assert plan_prompt(ids, [], KVSettings.of((1.0, 0.25)), config).kept_by_layer == (100, 25)
    assert plan_prompt(ids, [], KVSettings(0.99), config).kept_by_layer == (50, 25)
    assert plan_prompt(ids, [], KVSettings.of((0.4, 1.0)), config).kept_by_layer == (40, 40)
    assert scope_of(KVSettings(0.5), shares_of(KVSettings(0.5), schedule)) == "all"


TWO = (PruneLayer(2, 0.9), PruneLayer(4, 0.6, "vision"))


@given(prompts(), settings, windows, st.integers(1, 40), st.integers(0, 70))
def test_a_later_turn_drops_whole_blocks_of_what_its_first_turn_would(prompt, kv, window, block, first):
    """And nothing behind it, wherever the first turn ends, a picture's midst included."""
    ids, images = prompt
    alone = KVDropConfig(TWO, window, 10_000, SPECIAL)
    going_on = replace(alone, reuse_block=block)
    end = first if 0 < first < len(ids) else len(ids)
    cut = [(at, min(length, end - at)) for at, length in images if at < end]
    plan = plan_prompt(ids, images, replace(kv, first_turn=first), going_on)
    # text behind the last edge of a block stays, too
    text = end - max((at + length for at, length in cut), default=0)
    tail = max(window, end % block) if end % block <= text else window
    expected = plan_prompt(ids[:end], cut, kv, replace(alone, window=tail))
    if not kv.drops:
        assert plan == PromptPlan(len(ids), len(ids))
        return
    assert (plan.tokens, plan.behind) == (end, len(ids) - end)
    lost = [end - kept for kept in expected.kept_by_layer]
    assert [end - kept for kept in plan.kept_by_layer] == [tokens // block * block for tokens in lost]


@given(prompts(), settings, windows, st.integers(1, 40), st.integers(0, 70))
def test_who_refuses_or_leaves_by_an_exit_gets_the_plan_of_all_tokens(prompt, kv, window, block, first):
    ids, images = prompt
    alone = KVDropConfig(TWO, window, 10_000, SPECIAL)
    going_on = replace(alone, reuse_block=block)
    for settings in (replace(kv, reuse=False), replace(kv, above=(0.0,))):
        assert not reuses(settings, going_on)
        later = plan_prompt(ids, images, replace(settings, first_turn=first), going_on)
        assert later == plan_prompt(ids, images, settings, alone)


@given(prompts(), settings, windows)
def test_behind_the_settled_position_every_token_stays(prompt, kv, window):
    ids, images = prompt
    protected = protected_positions(ids, images, SPECIAL, kv.scope, window)
    at = settled_from(protected)
    assert protected[at:].all() and (at == 0 or not protected[at - 1])
