# SPDX-License-Identifier: Apache-2.0
"""How relevant a prompt's tokens are, from queries and keys of the decoder layer below a prune layer.

- `attention_received` is arXiv 2409.01162's second stage as this project reads it (its code was not
  released): tokens the text attends to little are irrelevant to it. With the last token's query alone it is
  FastV's (arXiv 2403.06764); without rotary embedding it lacks the preference for late positions (arXiv
  2412.01818).
- `pagerank` is AIM's (arXiv 2412.03248).
- `key_norm` is ViTCoP's (arXiv 2601.17818), after arXiv 2406.11430.

Each takes (queries, keys, bucket, how many queries ask, the logits' scale) and works on prompts of similar
length at once, without a device synchronisation: lengths and counts are known on the host, so shapes are;
padding is bounded by two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Smallest padded length of a bucket; below it padding costs less than another bucket.
MIN_BUCKET = 64
#: AIM's temperature and number of iterations.
TEMPERATURE, ITERATIONS = 0.1, 5
#: Attention weights that `pagerank` holds at once, in float32: 64 MiB.
_MOST_WEIGHTS = 1 << 24


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

    def inside(self) -> Tensor:
        """Which places are a token's and no padding, [R, L]."""
        return torch.arange(self.padded, device=self.start.device) < self.length[:, None]

    def rows(self, otherwise: int) -> Tensor:
        """The row of each token in the step's batch, [R, L]; `otherwise` for padding."""
        column = torch.arange(self.padded, device=self.start.device)
        return torch.where(self.inside(), self.start[:, None] + column, otherwise)


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
    exponents = np.ceil(np.log2(np.maximum(length, MIN_BUCKET))).astype(np.int64)
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
    asking = (bucket.length - queries)[:, None] + torch.arange(queries, device=q.device)

    q_ = q[bucket.start[:, None] + asking].float()
    q_ = q_.view(prompts, queries, kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
    k_ = k[bucket.rows(0)].float().permute(0, 2, 3, 1)
    logits = (q_ * scale).reshape(prompts, kv_heads, -1, size) @ k_
    logits = logits.view(prompts, heads, queries, padded)
    hidden = column > asking[:, None, :, None]
    weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
    return weights.sum((1, 2))


def pagerank(q: Tensor, k: Tensor, bucket: Bucket, queries: int, scale: float) -> Tensor:
    """Squared PageRank of each token in the prompt's attention, summed over heads (AIM).

    Per head A is the causal softmax of the logits over a temperature of 0.1, and five times pi <- pi A,
    without damping, from the uniform distribution. AIM's importance is the root of the mean square over
    heads, which ranks alike. A is made again in each iteration, some rows at a time: it is never whole in
    memory.

    Args:
        q: [N, heads, head_size].
        k: [N, kv_heads, head_size].
        bucket: the prompts.
        queries: not used; every token asks.
        scale: of the logits.

    Returns:
        [R, L] in float32; zero beyond a prompt's end.
    """
    heads, kv_heads, size = q.shape[1], k.shape[1], q.shape[2]
    prompts, padded = len(bucket.start), bucket.padded
    column = torch.arange(padded, device=q.device)
    rows = bucket.rows(0)
    k_ = k[rows].float().permute(0, 2, 3, 1)
    rank = (bucket.inside() / bucket.length[:, None])[:, None].expand(prompts, heads, padded)
    at_once = max(1, _MOST_WEIGHTS // (prompts * heads * padded))
    for _ in range(ITERATIONS):
        flow = torch.zeros(prompts, heads, padded, device=q.device)
        for asking in column.split(at_once):
            q_ = q[rows[:, asking]].float() * (scale / TEMPERATURE)
            q_ = q_.view(prompts, len(asking), kv_heads, heads // kv_heads, size).permute(0, 2, 3, 1, 4)
            logits = q_.reshape(prompts, kv_heads, -1, size) @ k_
            logits = logits.view(prompts, heads, len(asking), padded)
            weights = logits.masked_fill_(column > asking[:, None], -torch.inf).softmax(-1)
            flow += (rank[:, :, None, asking] @ weights).squeeze(2)
        rank = flow
    return rank.square().sum(1)


def key_norm(q: Tensor, k: Tensor, bucket: Bucket, queries: int, scale: float) -> Tensor:
    """The length of each token's key, negative, summed over key heads: a short key tends to be attended to.

    Args:
        q: not used.
        k: [N, kv_heads, head_size].
        bucket: the prompts.
        queries: not used.
        scale: not used.

    Returns:
        [R, L] in float32; zero beyond a prompt's end.
    """
    norms: Tensor = k[bucket.rows(0)].float().norm(dim=-1).sum(-1)
    return -norms * bucket.inside()
