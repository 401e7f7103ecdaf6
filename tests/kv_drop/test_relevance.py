# SPDX-License-Identifier: Apache-2.0
"""Which prompt tokens stay: the batched kernels against one prompt at a time, written plainly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_vtprune.kv_drop import ratings
from vllm_vtprune.kv_drop.ratings import Bucket, attention_received, make_buckets
from vllm_vtprune.kv_drop.relevance import RELEVANCE, PrunedPrompts, costliest, kept_rows

SIZE = 8


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def plain_scores(q: torch.Tensor, k: torch.Tensor, queries: int) -> torch.Tensor:
    """Mean attention of the last tokens to all n, [n]; q is [n, heads, size], k [n, kv_heads, size]."""
    n, heads = q.shape[:2]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    logits = torch.einsum("qhd,nhd->hqn", q, k).float() / SIZE**0.5
    logits += torch.full((n, n), -torch.inf).triu(1)
    return logits.softmax(-1)[:, -queries:].mean((0, 1))


def plain_kept(scores: torch.Tensor, protected: list[bool], count: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda i: (not protected[i], -float(scores[i]), i))
    return sorted(order[:count])


def batch(spans, protected, kept):
    """Prompts of a batch; `spans` are (start, length), `protected` a flat mask."""
    start, length = np.array(spans, dtype=np.int64).T
    buckets = tuple(
        Bucket(padded, *(torch.from_numpy(row) for row in members))
        for padded, members in make_buckets(start, length, np.array(kept))
    )
    rows = len(protected)
    rows_kept = rows - int(length.sum()) + sum(kept)
    return PrunedPrompts(rows, rows_kept, torch.tensor(protected), buckets)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_ragged_batch_keeps_what_each_prompt_alone_keeps(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    kv_heads = data.draw(st.sampled_from([1, 2]))
    heads = kv_heads * data.draw(st.sampled_from([1, 3]))
    queries = data.draw(st.integers(1, 5))
    spans, protected, kept, expected = [], [], [], []
    for _ in range(data.draw(st.integers(1, 4))):
        # rows of other requests in between, decoding or prefilling
        others = data.draw(st.integers(0, 3))
        expected += range(len(protected), len(protected) + others)
        protected += [False] * others
        length = data.draw(st.sampled_from([queries + 1, 20, 63, 64, 65, 150]))
        spans.append((len(protected), length))
        mask = [data.draw(st.booleans()) if i % 7 == 0 else False for i in range(length)]
        protected += mask
        kept.append(data.draw(st.integers(max(1, sum(mask)), length)))
    q = torch.randn(len(protected), heads, SIZE, generator=generator) * 2
    k = torch.randn(len(protected), kv_heads, SIZE, generator=generator) * 2
    for (start, length), count in zip(spans, kept, strict=True):
        rows = slice(start, start + length)
        stay = plain_kept(plain_scores(q[rows], k[rows], queries), protected[rows], count)
        expected += [start + i for i in stay]
    rows = kept_rows(
        q, k, batch(spans, protected, kept), queries=queries, total_heads=heads, scale=SIZE**-0.5
    )
    assert rows.tolist() == sorted(expected)


def plain_pagerank(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """AIM's importance of all n tokens, [n], with every attention weight in memory."""
    n, heads = q.shape[:2]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    importance = torch.zeros(n, dtype=torch.float64)
    for head in range(heads):
        logits = q[:, head].double() @ k[:, head].double().T / SIZE**0.5 / 0.1
        weights = (logits + torch.full((n, n), -torch.inf).triu(1)).softmax(-1)
        rank = torch.full((n,), 1 / n, dtype=torch.float64)
        for _ in range(5):
            rank = rank @ weights
        importance += rank**2 / heads
    return importance.sqrt().float()


@pytest.mark.parametrize("most_weights", [1, 4000, 1 << 24])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_pagerank_is_that_of_the_dense_matrix_however_few_rows_are_held(monkeypatch, most_weights, kv_heads):
    monkeypatch.setattr(ratings, "_MOST_WEIGHTS", most_weights)
    q, k = torch.randn(100, 4, SIZE) / 3, torch.randn(100, kv_heads, SIZE) / 3
    spans = [(2, 40), (45, 33)]
    bucket = Bucket(40, torch.tensor([2, 45]), torch.tensor([40, 33]), torch.tensor([1, 1]))
    found = ratings.pagerank(q, k, bucket, 8, SIZE**-0.5)
    for row, (start, length) in zip(found, spans, strict=True):
        rows = slice(start, start + length)
        importance = (row[:length] / 4).sqrt()
        torch.testing.assert_close(importance, plain_pagerank(q[rows], k[rows]), atol=1e-6, rtol=1e-4)
        assert not row[length:].any()


def test_key_norm_keeps_the_shortest_keys():
    q, k = torch.randn(60, 4, SIZE), torch.randn(60, 2, SIZE)
    prompts = batch([(10, 40)], [False] * 60, [15])
    rows = kept_rows(
        q, k, prompts, relevance=RELEVANCE["key_norm"], queries=8, total_heads=4, scale=SIZE**-0.5
    )
    length = [sum(float(k[i, head].norm()) for head in range(2)) for i in range(10, 50)]
    shortest = sorted(range(40), key=lambda i: length[i])[:15]
    assert rows.tolist() == [*range(10), *sorted(10 + i for i in shortest), *range(50, 60)]


def test_a_settled_prompt_keeps_its_protected_tokens_and_is_not_rated():
    protected = [i in (0, 3, 7, 21, 24) for i in range(30)]
    prompts = PrunedPrompts(30, 13, torch.tensor(protected), (), settled=((5, 20),))
    nothing = torch.empty(30, 0, 0)
    rows = kept_rows(nothing, nothing, prompts)
    assert rows.tolist() == [0, 1, 2, 3, 4, 7, 21, 24, 25, 26, 27, 28, 29]


def test_scores_are_attention_and_sum_to_one():
    q, k = torch.randn(30, 4, SIZE), torch.randn(30, 2, SIZE)
    bucket = Bucket(40, torch.tensor([0]), torch.tensor([30]), torch.tensor([10]))
    received = attention_received(q, k, bucket, 5, SIZE**-0.5)[0] / (4 * 5)
    torch.testing.assert_close(received[:30], plain_scores(q, k, 5), atol=1e-6, rtol=1e-5)
    assert received[30:].abs().max() == 0
    assert float(received.sum()) == pytest.approx(1)


def test_equal_scores_go_to_the_earlier_position():
    # small integers, so that every logit is exact; causality hides nothing from the last token's query
    q, k = torch.ones(50, 2, SIZE), torch.ones(50, 2, SIZE)
    rows = kept_rows(q, k, batch([(0, 50)], [False] * 50, [20]), queries=1, total_heads=2, scale=SIZE**-0.5)
    assert rows.tolist() == list(range(20))


def test_ranks_of_tensor_parallelism_keep_the_same_tokens():
    heads, ranks = 8, 2
    q, k = torch.randn(90, heads, SIZE) * 2, torch.randn(90, heads, SIZE) * 2
    prompts = batch([(0, 90)], [False] * 90, [30])
    arguments = {"queries": 4, "total_heads": heads, "scale": SIZE**-0.5}
    whole = kept_rows(q, k, prompts, **arguments).tolist()
    halves = [(q[:, r::ranks], k[:, r::ranks]) for r in range(ranks)]
    local: list[torch.Tensor] = []
    for half in halves:
        kept_rows(*half, prompts, **arguments, all_reduce=lambda t: (local.append(t.clone()), t)[1])
    for half in halves:
        assert kept_rows(*half, prompts, **arguments, all_reduce=lambda t: sum(local)).tolist() == whole
    assert kept_rows(*halves[0], prompts, **arguments).tolist() != whole


def test_known_positions_are_not_rated_again():
    q, k = torch.randn(70, 2, SIZE), torch.randn(70, 2, SIZE)
    kept = torch.tensor([0, 5, 9, 69])
    prompts = PrunedPrompts(72, 6, torch.zeros(72, dtype=torch.bool), (), ((1, 70, kept),))
    rows = kept_rows(
        torch.cat([q, q[:2]]), torch.cat([k, k[:2]]), prompts, queries=4, total_heads=2, scale=1.0
    )
    assert rows.tolist() == [0, 1, 6, 10, 70, 71]


@pytest.mark.parametrize("relevance", [name for name, rating in RELEVANCE.items() if not rating.inherits])
def test_rating_asks_the_device_for_nothing(monkeypatch, relevance):
    def forbidden(*args, **kwargs):
        raise AssertionError("a hidden device synchronisation")

    prompts = batch([(0, 90), (95, 40)], [False] * 140, [30, 20])
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    q, k = torch.randn(140, 4, SIZE), torch.randn(140, 2, SIZE)
    kept_rows(q, k, prompts, relevance=RELEVANCE[relevance], queries=4, total_heads=4, scale=1.0)


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=40))
def test_buckets_hold_each_prompt_once_and_pad_by_two_at_most(lengths):
    start = np.arange(len(lengths))
    buckets = make_buckets(start, np.array(lengths), np.array(lengths))
    members = np.concatenate([m for _, m in buckets], axis=1)
    assert sorted(members[0]) == start.tolist()
    for padded, (_, length, _) in buckets:
        assert padded == length.max()
        assert padded <= 64 or (padded < 2 * length).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_batch_is_padded_further_than_the_costliest(data):
    """So what vLLM's memory profile has seen is enough for every step."""
    rows, requests = data.draw(st.integers(200, 2000)), data.draw(st.integers(1, 40))
    longest, queries = data.draw(st.integers(100, rows)), data.draw(st.integers(1, 8))
    lengths, left = [], rows
    while left > queries and len(lengths) < requests and (not lengths or data.draw(st.booleans())):
        lengths.append(data.draw(st.integers(queries + 1, max(min(left, longest), queries + 1))))
        left -= lengths[-1]
    length = np.array(lengths, dtype=np.int64)
    start = length.cumsum() - length
    padded = sum(width * members.shape[1] for width, members in make_buckets(start, length, length // 2))
    prompts = costliest(rows, requests, longest, queries, torch.device("cpu"))
    (bucket,) = prompts.buckets
    assert int((bucket.start + bucket.length).max()) <= rows and len(bucket.start) <= requests
    assert int(bucket.length.min()) > queries and int(bucket.length.max()) <= longest
    assert padded <= 1.1 * len(bucket.start) * bucket.padded
    q, k = torch.randn(rows, 2, SIZE), torch.randn(rows, 1, SIZE)
    kept = kept_rows(q, k, prompts, queries=queries, total_heads=2, scale=1.0)
    assert len(kept) == prompts.rows_kept < rows
