# SPDX-License-Identifier: Apache-2.0
"""Which prompt tokens stay: attention from the question's end to every prompt token, at the prune layer.

The score is arXiv 2409.01162's second stage as this project reads it (its code was not released): tokens the
text attends to little are irrelevant to it. `last_token` is FastV's (arXiv 2403.06764); `no_rope` leaves the
rotary embedding out, against the preference for late positions that it brings (arXiv 2412.01818).

Everything works on a ragged batch in a few kernels and without a device synchronisation: lengths and counts
are known on the host, so shapes are; prompts are padded in buckets of similar length, which bounds padding by
two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Smallest padded length of a bucket; below it padding costs less than another bucket.
_MIN_BUCKET = 64


@dataclass(frozen=True)
class Bucket:
    """Prompts of similar length, padded to one.

    Attributes:
        padded: L, the padded length.
        start: row of each prompt's first token in the step's batch, [R].
        length: tokens of each prompt, [R].
        kept: how many of them stay, [R].
    """

    padded: int
    start: Tensor
    length: Tensor
    kept: Tensor


@dataclass(frozen=True)
class PrunedPrompts:
    """The prompts of a step that lose tokens.

    Attributes:
        rows: N, tokens in the step's batch, those of other requests included.
        rows_kept: how many of them go on to the layers above.
        protected: rows that stay whatever their relevance, [N]; only rows of pruned prompts are looked at.
            Above a lower prune layer, in the rows of the whole batch that the lowest one is given.
        buckets: the prompts to rank.
        known: prompts pruned before, then preempted: first row, length, and the positions that stayed,
            [kept].
        settled: prompts of which exactly the protected tokens stay: first row and length.
    """

    rows: int
    rows_kept: int
    protected: Tensor
    buckets: tuple[Bucket, ...]
    known: tuple[tuple[int, int, Tensor], ...] = ()
    settled: tuple[tuple[int, int], ...] = ()

    @property
    def cuts(self) -> bool:
        """Whether any row leaves here."""
        return self.rows_kept < self.rows


def make_buckets(
    start: NDArray[np.int64], length: NDArray[np.int64], kept: NDArray[np.int64]
) -> list[tuple[int, NDArray[np.int64]]]:
    """Group prompts by length rounded up to a power of two.

    Args:
        start: as in `Bucket`, [R].
        length: as in `Bucket`, [R].
        kept: as in `Bucket`, [R].

    Returns:
        Per bucket its padded length and the three rows of its prompts, [3, R_b].
    """
    facts = np.stack([start, length, kept])
    exponents = np.ceil(np.log2(np.maximum(length, _MIN_BUCKET))).astype(np.int64)
    buckets = []
    for exponent in np.unique(exponents):
        members = facts[:, exponents == exponent]
        # the longest member is enough: rounding up only decides who shares a bucket
        buckets.append((int(members[1].max()), members))
    return buckets


def attention_received(q: Tensor, k: Tensor, bucket: Bucket, queries: int, scale: float) -> Tensor:
    """Causal softmax attention of each prompt's last tokens to all its tokens, summed over heads and queries.

    Args:
        q: [N, heads, head_size].
        k: [N, kv_heads, head_size]; query head h reads key head h // (heads / kv_heads).
        bucket: the prompts; each is longer than `queries`.
        queries: how many of the last tokens ask.
        scale: of the logits.

    Returns:
        [R, L] in float32; zero beyond a prompt's end.
    """
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
    prompts, padded = len(bucket.start), bucket.padded
    column = torch.arange(padded, device=q.device)
    rows = torch.where(_inside(bucket, column), bucket.start[:, None] + column, 0)
    asking = (bucket.length - queries)[:, None] + torch.arange(queries, device=q.device)

    q_ = q[bucket.start[:, None] + asking].float()
    q_ = q_.view(prompts, queries, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    k_ = k[rows].float().permute(0, 2, 3, 1)
    logits = (q_ * scale).reshape(prompts, kv_heads, -1, size) @ k_
    logits = logits.view(prompts, heads, queries, padded)
    hidden = column > asking[:, None, :, None]
    weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
    return weights.sum((1, 2))


@dataclass(frozen=True)
class Relevance:
    """One way to rate tokens.

    Attributes:
        rotary: queries and keys after rotary embedding, as attention uses them; before it otherwise.
        last_only: the last prompt token's query alone; those of the whole window otherwise.
        rating: scores of a bucket's tokens, [R, L], from queries, keys, the bucket, how many queries ask and
            the logits' scale; summed over heads.
    """

    rotary: bool = True
    last_only: bool = False
    rating: Callable[[Tensor, Tensor, Bucket, int, float], Tensor] = attention_received

    def queries(self, window: int) -> int:
        """How many of the last prompt tokens rate the others."""
        return 1 if self.last_only else window


RELEVANCE: Mapping[str, Relevance] = MappingProxyType(
    {
        "attention": Relevance(),
        "last_token": Relevance(last_only=True),
        "no_rope": Relevance(rotary=False),
    }
)


def rate(
    q: Tensor,
    k: Tensor,
    prompts: PrunedPrompts,
    *,
    relevance: Relevance = RELEVANCE["attention"],
    queries: int,
    total_heads: int,
    scale: float,
    all_reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """How relevant each row of a step's batch is.

    Args:
        q: queries of the layer below the prune layer, [rows >= N, heads, head_size]; this rank's heads.
        k: keys of that layer, [rows >= N, kv_heads, head_size].
        prompts: what is pruned; prompts outside its buckets are not rated.
        relevance: the rating.
        queries: how many of a prompt's last tokens rate it.
        total_heads: query heads of the layer over all tensor-parallel ranks.
        scale: of the attention logits.
        all_reduce: sums over tensor-parallel ranks, which would otherwise keep different tokens.

    Returns:
        [N] in float32; 0 for rows that are not rated.
    """
    n, device = prompts.rows, q.device
    scores = torch.zeros(n + 1, dtype=torch.float32, device=device)
    for bucket in prompts.buckets:
        received = relevance.rating(q, k, bucket, queries, scale) / (total_heads * queries)
        scores.scatter_(0, _places(bucket, n).flatten(), received.flatten())
    if all_reduce is not None:
        scores = all_reduce(scores)
    return scores[:n]


def keep(scores: Tensor | None, protected: Tensor, prompts: PrunedPrompts) -> Tensor:
    """The rows of a step's batch that go on to the layers above the prune layer, in order.

    Of each pruned prompt the protected tokens and the most relevant others stay, exactly as many as planned;
    equal scores go to the earlier position. Rows outside the pruned prompts all stay.

    Args:
        scores: relevance of each row, [N]; None where no prompt is to be ranked.
        protected: rows that stay in any case, [N].
        prompts: what is pruned.

    Returns:
        [rows_kept] int64.
    """
    n, device = prompts.rows, protected.device
    # one place past the end takes what belongs nowhere: padding, and rows that leave
    stays = torch.ones(n + 1, dtype=torch.bool, device=device)
    if scores is not None:
        ranked = torch.full((n + 1,), -torch.inf, dtype=torch.float32, device=device)
        ranked[:n] = scores.masked_fill(protected, torch.inf)
        for bucket in prompts.buckets:
            place = _places(bucket, n)
            order = ranked[place].sort(dim=1, descending=True, stable=True).indices
            column = torch.arange(bucket.padded, device=device)
            rank = torch.empty_like(order).scatter_(1, order, column.expand_as(order))
            stays.scatter_(0, place.flatten(), (rank < bucket.kept[:, None]).flatten())
    for start, length in prompts.settled:
        stays[start : start + length] = protected[start : start + length]
    for start, length, kept in prompts.known:
        stays[start : start + length] = False
        stays[start + kept] = True

    # nonzero() would ask the device for its length; the host knows it
    stays = stays[:n]
    slot = torch.where(stays, stays.cumsum(0) - 1, prompts.rows_kept)
    rows = torch.empty(prompts.rows_kept + 1, dtype=torch.int64, device=device)
    return rows.scatter_(0, slot, torch.arange(n, device=device))[: prompts.rows_kept]


def _places(bucket: Bucket, n: int) -> Tensor:
    """The row of each of a bucket's tokens, [R, L]; n for padding."""
    column = torch.arange(bucket.padded, device=bucket.start.device)
    return torch.where(_inside(bucket, column), bucket.start[:, None] + column, n)


def _inside(bucket: Bucket, column: Tensor) -> Tensor:
    return column < bucket.length[:, None]
