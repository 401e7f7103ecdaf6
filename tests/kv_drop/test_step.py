# SPDX-License-Identifier: Apache-2.0
"""One step above the prune layer: a simulated cache must end up holding what each request kept, in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vtprune.kv_drop import step as step_module
from vllm_vtprune.kv_drop.bands import KVDropBands
from vllm_vtprune.kv_drop.geometry import RequestDrop, step_geometry
from vllm_vtprune.kv_drop.relevance import keep, kept_rows
from vllm_vtprune.kv_drop.step import KVDropState


@dataclass
class _Request:
    tokens: int
    dropped: int
    computed: int = 0
    cache: dict[int, int] = field(default_factory=dict)  # place -> original position

    @cached_property
    def drop(self) -> RequestDrop | None:
        protected = np.zeros(self.tokens, dtype=bool)
        protected[-1] = True
        return RequestDrop(self.tokens, self.dropped, protected) if self.dropped else None


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_kept_token_lands_in_the_next_place_of_its_request(data):
    requests = []
    for _ in range(data.draw(st.integers(1, 5))):
        tokens = data.draw(st.integers(2, 90))
        requests.append(_Request(tokens, data.draw(st.integers(0, tokens - 2)) if tokens > 9 else 0))
    state = KVDropState(8, 4000, torch.device("cpu"))
    batch = requests
    for kind in data.draw(st.lists(st.sampled_from(["any", "decode", "decode", "preempt"]), max_size=14)):
        if kind == "preempt":
            batch[0].computed = 0
            batch[0].cache.clear()
        if kind == "any":
            batch = data.draw(st.permutations(requests))
        scheduled = []
        for r in batch:
            if r.computed == 0 and r.dropped:
                # whole, or with the tokens generated before a preemption
                scheduled.append(r.tokens + data.draw(st.integers(0, 2)))
            else:
                scheduled.append(data.draw(st.integers(1, 4)) if kind == "any" else 1)
        now = np.array(scheduled, dtype=np.int32)
        computed = np.array([r.computed for r in batch], dtype=np.int32)
        state.begin([r.drop for r in batch], now, computed)
        rows = torch.arange(int(now.sum()))
        if state.prompts is not None:
            rows = kept_rows(
                torch.randn(len(rows), 2, 4),
                torch.randn(len(rows), 2, 4),
                state.prompts,
                queries=1,
                total_heads=2,
                scale=0.5,
            )
        request_of = np.repeat(np.arange(len(batch)), now)
        position_of = np.concatenate([c + np.arange(n) for c, n in zip(computed, now, strict=True)])
        if state.step is None:
            places, ends = position_of, np.cumsum(now)
        else:
            places, ends = state.positions[: len(rows)].numpy(), state.step.query_start_loc[1:]
            assert state.query_start_loc[: len(batch) + 1].tolist() == [0, *ends]
            assert state.step.max_query_len == np.diff(state.step.query_start_loc).max()
        assert ends[-1] == len(rows)
        for row, place in zip(rows.tolist(), places, strict=True):
            request = batch[request_of[row]]
            assert place == len(request.cache)
            request.cache[int(place)] = int(position_of[row])
        for r, n in zip(batch, scheduled, strict=True):
            r.computed += n
            assert len(r.cache) == r.computed - r.dropped
            assert list(r.cache.values()) == sorted(r.cache.values())


@dataclass
class _Banded:
    """A request with two prune layers; each band's cache maps a place to the original position."""

    tokens: int
    kept: tuple[int, int]
    rated: tuple[bool, bool]
    computed: int = 0
    caches: tuple[dict[int, int], ...] = field(default_factory=lambda: ({}, {}))

    @cached_property
    def drops(self) -> tuple[RequestDrop, RequestDrop] | None:
        protected = np.zeros(self.tokens, dtype=bool)
        protected[[0, 5, -1]] = True
        low, high = self.kept
        if high == self.tokens:
            return None
        return (
            RequestDrop(self.tokens, self.tokens - low, protected, rated=self.rated[0]),
            RequestDrop(
                self.tokens, self.tokens - high, protected, lost=self.tokens - low, rated=self.rated[1]
            ),
        )


@st.composite
def _banded(draw: st.DrawFn) -> _Banded:
    tokens = draw(st.integers(10, 90))
    low = draw(st.one_of(st.just(tokens), st.just(3), st.integers(3, tokens)))
    high = draw(st.one_of(st.just(low), st.just(3), st.integers(3, low)))
    # what only the protected tokens survive, or nothing leaves, needs no rating
    rated = (3 < low < tokens, 3 < high < low)
    return _Banded(tokens, (low, high), rated)


@settings(max_examples=80, deadline=None)
@given(st.lists(_banded(), min_size=1, max_size=5), st.data())
def test_each_bands_cache_holds_a_subset_of_the_one_below(requests, data):
    bands = KVDropBands(2, 8, 4000, torch.device("cpu"))
    batch = requests
    for kind in data.draw(st.lists(st.sampled_from(["any", "decode", "decode", "preempt"]), max_size=10)):
        if kind == "preempt":
            batch[0].computed = 0
            for cache in batch[0].caches:
                cache.clear()
        if kind == "any":
            batch = data.draw(st.permutations(requests))
        now = np.array([r.tokens if r.computed == 0 and r.drops else 1 for r in batch], dtype=np.int32)
        computed = np.array([r.computed for r in batch], dtype=np.int32)
        bands.begin([r.drops for r in batch], now, computed)
        request_of = np.repeat(np.arange(len(batch)), now)
        position_of = np.concatenate([c + np.arange(n) for c, n in zip(computed, now, strict=True)])
        stayed = torch.arange(int(now.sum()))
        for index, state in enumerate(bands.bands):
            if state.prompts is not None and state.prompts.cuts:
                scores = torch.randn(len(stayed))
                rows = keep(scores, state.prompts.protected[stayed], state.prompts)
                state.remember(rows)
                stayed = stayed[rows]
            places = state.positions[: len(stayed)] if state.step is not None else position_of[stayed.numpy()]
            for row, place in zip(stayed.tolist(), places.tolist(), strict=True):
                cache = batch[request_of[row]].caches[index]
                assert place == len(cache)
                cache[place] = int(position_of[row])
        for r, n in zip(batch, now.tolist(), strict=True):
            r.computed += n
            low, high = (list(cache.values()) for cache in r.caches)
            after = r.computed - r.tokens
            assert set(high) <= set(low)
            if r.drops is not None:
                assert (len(low), len(high)) == (r.kept[0] + after, r.kept[1] + after)
                assert {0, 5, r.tokens - 1} <= set(high)


def test_a_step_of_untouched_requests_leaves_vllms_batch_alone():
    state = KVDropState(4, 100, torch.device("cpu"))
    state.begin([None, None], np.array([5, 1], dtype=np.int32), np.array([0, 7], dtype=np.int32))
    assert state.step is None and state.prompts is None and not state.dropped.any()


def test_buffers_keep_their_addresses():
    state = KVDropState(4, 100, torch.device("cpu"))
    addresses = [
        t.data_ptr() for t in (state.dropped, state.seq_lens, state.query_start_loc, state.positions)
    ]
    drop = RequestDrop(20, 8, np.ones(20, dtype=bool))
    state.begin([drop, None], np.array([20, 1], dtype=np.int32), np.array([0, 7], dtype=np.int32))
    assert state.dropped.tolist() == [8, 0, 0, 0]
    state.begin([None, drop], np.array([1, 1], dtype=np.int32), np.array([8, 20], dtype=np.int32))
    assert state.dropped.tolist() == [0, 8, 0, 0] and state.prompts is None
    state.clear()
    assert not state.dropped.any()
    after = [t.data_ptr() for t in (state.dropped, state.seq_lens, state.query_start_loc, state.positions)]
    assert after == addresses


def test_a_preempted_request_loses_the_same_tokens():
    state = KVDropState(4, 200, torch.device("cpu"))
    drop = RequestDrop(80, 50, np.zeros(80, dtype=bool))

    def prefill(generated: int) -> list[int]:
        state.begin(
            [None, drop], np.array([3, 80 + generated], dtype=np.int32), np.array([9, 0], dtype=np.int32)
        )
        n = 83 + generated
        # other queries and keys each time: only memory can give the same positions
        rows = kept_rows(
            torch.randn(n, 2, 4), torch.randn(n, 2, 4), state.prompts, queries=4, total_heads=2, scale=1.0
        )
        state.remember(rows)
        return rows.tolist()

    first, again = prefill(0), prefill(5)
    assert len(first) == 33 and again == [*first, 83, 84, 85, 86, 87]


def test_a_request_with_too_few_blocks_writes_nothing_and_is_named():
    """Whole, pruned now and pruned before: each needs exactly its blocks, and one fewer is too few."""
    state = KVDropState(4, 100, torch.device("cpu"))
    drop = RequestDrop(20, 8, np.ones(20, dtype=bool))
    table = torch.arange(12).view(3, 4) + 1
    drops, scheduled, computed = [None, drop, drop], np.array([5, 20, 1]), np.array([4, 0, 21])
    rows = [slice(0, 5), slice(5, 17), slice(17, 18)]
    enough = np.array([3, 3, 4])
    for begin in (drops, [None, None, None]):
        now = np.array([5, 12, 1]) if begin is not drops else scheduled
        before = np.array([4, 0, 13]) if begin is not drops else computed
        for short in (None, 0, 1, 2):
            state.begin(begin, now, before)
            slots = torch.full((40,), 7)
            state.write_slots(table, 4, slots, enough - (np.arange(3) == short))
            assert state.overrun == ({short} if short is not None else set())
            for index, its in enumerate(rows):
                assert bool((slots[its] == -1).all()) is (index == short)
    state.clear()  # a dummy run, of which V1's hook knows the blocks of whoever was there before
    state.write_slots(table, 4, slots, np.zeros(3, dtype=np.int32))
    assert not state.overrun


def test_geometry_of_a_mixed_step():
    step = step_geometry(
        np.array([10, 1, 4], dtype=np.int32),
        np.array([0, 12, 3], dtype=np.int32),
        np.array([6, 5, 0], dtype=np.int32),
    )
    assert step.query_start_loc.tolist() == [0, 4, 5, 9]
    assert step.positions.tolist() == [0, 1, 2, 3, 7, 3, 4, 5, 6]
    assert (step.pruned.tolist(), step.starts.tolist(), step.rows) == ([0], [0, 10, 11], 9)


def test_a_decode_step_of_the_same_requests_reuses_their_geometry(monkeypatch):
    state = KVDropState(4, 100, torch.device("cpu"))
    drop = RequestDrop(20, 8, np.ones(20, dtype=bool))

    def begin(drops, scheduled, computed):
        state.begin(drops, np.array(scheduled, dtype=np.int32), np.array(computed, dtype=np.int32))
        return state.positions[: sum(scheduled)].tolist()

    assert begin([None, drop], [1, 1], [8, 20]) == [8, 12]
    calls = []
    monkeypatch.setattr(step_module, "step_geometry", lambda *a: calls.append(a) or step_geometry(*a))
    assert begin([None, drop], [1, 1], [9, 21]) == [9, 13]
    assert not calls
    begin([drop, None], [1, 1], [22, 10])  # other rows
    begin([drop, None], [1, 2], [23, 11])  # more than a token
    begin([drop, None], [20, 1], [0, 13])  # preempted, and prefilled again
    assert len(calls) == 3
