# SPDX-License-Identifier: Apache-2.0
"""Which prompt tokens stay at a prune layer: the ratings by name, and the rows that they leave.

Everything works on a ragged batch in a few kernels and without a device synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vllm_vtprune.kv_drop.ratings import MIN_BUCKET, Bucket, attention_received, key_norm, pagerank


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


def costliest(
    rows: int, max_requests: int, longest: int, queries: int, device: torch.device
) -> PrunedPrompts:
    """The batch that rating needs most memory for: one bucket, padded as far as the rounding allows.

    Args:
        rows: N, tokens that a step may hold.
        max_requests: requests that a step may hold.
        longest: the longest prompt that is pruned.
        queries: how many of a prompt's last tokens rate it.
        device: where it is rated.
    """
    longest = min(longest, rows)
    best = [longest]
    for padded in [*range(MIN_BUCKET, longest, MIN_BUCKET), longest]:
        # one prompt of this length, and others just long enough to share its bucket (`make_buckets`)
        half = 1 << (padded - 1).bit_length() - 1
        other = max(half if padded > MIN_BUCKET else 0, queries) + 1
        others = min((rows - padded) // other, max_requests - 1)
        if (1 + others) * padded > len(best) * best[0]:
            best = [padded, *[other] * others]
    length = torch.tensor(best, device=device)
    bucket = Bucket(best[0], length.cumsum(0) - length, length, (length + 1) // 2)
    protected = torch.zeros(rows, dtype=torch.bool, device=device)
    return PrunedPrompts(rows, rows - int((length - bucket.kept).sum()), protected, (bucket,))


@dataclass(frozen=True)
class Relevance:
    """One way to rate tokens.

    Attributes:
        rotary: queries and keys after rotary embedding, as attention uses them; before it otherwise.
        last_only: the last prompt token's query alone; those of the whole window otherwise.
        inherits: nothing is rated: the scores are those of the prune layer below.
        rating: scores of a bucket's tokens, [R, L], from queries, keys, the bucket, how many queries ask and
            the logits' scale; summed over heads.
    """

    rotary: bool = True
    last_only: bool = False
    inherits: bool = False
    rating: Callable[[Tensor, Tensor, Bucket, int, float], Tensor] = attention_received

    def queries(self, window: int) -> int:
        """How many of the last prompt tokens rate the others."""
        return 1 if self.last_only else window


RELEVANCE: Mapping[str, Relevance] = MappingProxyType(
    {
        "attention": Relevance(),
        "last_token": Relevance(last_only=True),
        "no_rope": Relevance(rotary=False),
        "pagerank": Relevance(rating=pagerank),
        "key_norm": Relevance(rating=key_norm),
        "inherited": Relevance(inherits=True),
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
        scores.scatter_(0, bucket.rows(n).flatten(), received.flatten())
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
            place = bucket.rows(n)
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


def kept_rows(q: Tensor, k: Tensor, prompts: PrunedPrompts, **rating: Any) -> Tensor:
    """`rate`, which has the arguments, then `keep`, at the only prune layer, [rows_kept] int64."""
    scores = rate(q, k, prompts, **rating) if prompts.buckets else None
    return keep(scores, prompts.protected, prompts)
