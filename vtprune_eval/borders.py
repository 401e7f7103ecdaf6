# SPDX-License-Identifier: Apache-2.0
"""Stage 2 of a batch of prompts on transformers: what leaves at each prune layer, and which tokens.

Counts and choice are the engine's own (`vllm_vtprune.kv_drop.shares` and `.relevance`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_vtprune.contract import KVScope
from vllm_vtprune.kv_drop.ratings import Bucket, make_buckets
from vllm_vtprune.kv_drop.relevance import RELEVANCE, PrunedPrompts, Relevance, keep, rate
from vllm_vtprune.kv_drop.schedule import PruneLayer
from vllm_vtprune.kv_drop.shares import protected_positions, rated_at, scope_of, shares_of, tokens_kept
from vllm_vtprune.settings import KVSettings

#: How stage 2 can rate tokens: as the engine can, and at random, the baseline for its choice.
RATINGS: Mapping[str, Relevance] = {**RELEVANCE, "random": Relevance()}


@dataclass(frozen=True)
class Prompt:
    """One picture's question.

    Attributes:
        before: token ids ahead of the picture.
        picture: its number in the batch's pictures.
        after: token ids behind it, the question's.
    """

    before: tuple[int, ...]
    picture: int
    after: tuple[int, ...]


@dataclass(frozen=True)
class Dropping:
    """Stage 2 as one setting asks for it.

    Attributes:
        shares: what stays above each prune layer, the request's wishes included (`kv_drop.shares.shares_of`).
        scope: what competes.
        window: last prompt tokens that rate the others and stay.
        relevance: names of `RATINGS`, one for each prune layer; the last holds for the rest.
        special_ids: the tokenizer's special tokens, the image placeholder aside.
        draw: of `random`, which of several draws.
    """

    shares: tuple[PruneLayer, ...]
    scope: KVScope
    window: int
    relevance: tuple[str, ...]
    special_ids: frozenset[int]
    draw: int = 0

    @staticmethod
    def of(
        kv: KVSettings,
        schedule: Sequence[PruneLayer],
        window: int,
        relevance: Sequence[str],
        special_ids: frozenset[int],
        draw: int = 0,
    ) -> Dropping:
        """What a request gets under a schedule."""
        shares = shares_of(kv, schedule)
        return Dropping(shares, scope_of(kv, shares), window, tuple(relevance), special_ids, draw)

    def relevance_at(self, index: int) -> str:
        """The rating at the prune layer of that index."""
        return self.relevance[min(index, len(self.relevance) - 1)]


class Borders:
    """Prompts on their way up through the prune layers.

    Attributes:
        kept: tokens of each prompt above each prune layer, [borders, B].
    """

    def __init__(
        self, prompts: Sequence[Prompt], pictures: Sequence[int], dropping: Dropping, device: torch.device
    ) -> None:
        """Plan them.

        Args:
            prompts: B of them.
            pictures: tokens of each picture.
            dropping: stage 2.
            device: of the rows.
        """
        self._dropping, self._device = dropping, device
        self._lengths, kept, masks, rated = [], [], [], []
        inherits = [RATINGS[dropping.relevance_at(i)].inherits for i in range(len(dropping.shares))]
        for prompt in prompts:
            mask, left = plan_of(prompt, pictures[prompt.picture], dropping)
            masks.append(mask)
            kept.append(left)
            self._lengths.append(len(mask))
            rated.append(rated_at(len(mask), left, int(mask.sum()), inherits))
        self.kept: NDArray[np.int64] = np.array(kept, dtype=np.int64).T
        self._rated = np.array(rated, dtype=bool).T
        self._protected = torch.from_numpy(np.concatenate(masks)).to(device)
        self._scores: Tensor | None = None

    def at(self, index: int) -> PrunedPrompts:
        """The batch as it reaches a prune layer; in order, from the lowest up."""
        reaching = np.array(self._lengths) if index == 0 else self.kept[index - 1]
        kept, rated = self.kept[index], self._rated[index]
        start = np.cumsum(reaching) - reaching
        buckets = make_buckets(start[rated], reaching[rated], kept[rated]) if rated.any() else []
        settled = ~rated & (kept < reaching)
        return PrunedPrompts(
            rows=int(reaching.sum()),
            rows_kept=int(kept.sum()),
            protected=self._protected,
            buckets=tuple(
                Bucket(padded, *torch.from_numpy(facts).to(self._device)) for padded, facts in buckets
            ),
            settled=tuple(zip(start[settled].tolist(), reaching[settled].tolist(), strict=True)),
        )

    def rating_at(self, index: int) -> Relevance | None:
        """How tokens are rated anew at a prune layer; None where they are not."""
        rating = RATINGS[self._dropping.relevance_at(index)]
        return rating if self._rated[index].any() and not rating.inherits else None

    def rate(self, index: int, q: Tensor, k: Tensor, prompts: PrunedPrompts, scale: float) -> Tensor:
        """Rate the rows that reach a prune layer.

        Args:
            index: the prune layer's.
            q: queries of the layer below, [rows, heads, head_size].
            k: keys, [rows, kv_heads, head_size].
            prompts: from `at`.
            scale: of the attention logits.

        Returns:
            The scores, [rows], which `keep` uses.
        """
        name = self._dropping.relevance_at(index)
        if name == "random":
            generator = torch.Generator(self._device).manual_seed(1000 * self._dropping.draw + index)
            q, k = (torch.empty_like(x).normal_(generator=generator) for x in (q, k))
        rating = RATINGS[name]
        queries = rating.queries(self._dropping.window)
        self._scores = rate(
            q, k, prompts, relevance=rating, queries=queries, total_heads=q.shape[1], scale=scale
        )
        return self._scores

    def keep(self, prompts: PrunedPrompts) -> Tensor:
        """The rows that go on, [rows_kept]; what is known of the others is forgotten."""
        rows = keep(self._scores, self._protected, prompts)
        self._protected = self._protected[rows]
        self._scores = None if self._scores is None else self._scores[rows]
        return rows


def plan_of(prompt: Prompt, picture: int, dropping: Dropping) -> tuple[NDArray[np.bool_], list[int]]:
    """The tokens of a prompt that stay in any case, [n], and how many stay above each prune layer."""
    ids = [*prompt.before, *[0] * picture, *prompt.after]
    placeholder = [(len(prompt.before), picture)]
    mask = protected_positions(ids, placeholder, dropping.special_ids, dropping.scope, dropping.window)
    return mask, tokens_kept(len(ids), picture, int(mask.sum()), dropping.shares)
