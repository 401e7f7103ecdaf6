# SPDX-License-Identifier: Apache-2.0
"""Greedy answers from a LLaVA's decoder on transformers, many prompts at once, with stage 2 inside.

Counts and choice of stage 2 are the engine's own (`vllm_vtprune.kv_drop.plan` and `.relevance`); the layers
are transformers'. Prompts are padded on the right and masked, positions are each prompt's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_vtprune.kv_drop.plan import protected_positions, scope_of, shares_of, tokens_kept
from vllm_vtprune.kv_drop.ratings import Bucket, make_buckets
from vllm_vtprune.kv_drop.relevance import RELEVANCE, PrunedPrompts, Relevance, kept_rows
from vllm_vtprune.kv_drop.schedule import PruneLayer
from vllm_vtprune.settings import KVSettings

#: How stage 2 can rate tokens: as the engine can, and at random, the baseline for its choice.
RATINGS: Mapping[str, Relevance] = {
    **{name: rating for name, rating in RELEVANCE.items() if not rating.inherits},
    "random": Relevance(),
}


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
    """Stage 2 as one setting asks for it."""

    kv: KVSettings
    prune_layer: int
    window: int
    relevance: str
    special_ids: frozenset[int]


@dataclass
class _Run:
    """Prompts on their way: the cache, and which of its entries count in which layers."""

    cache: DynamicCache
    segments: list[tuple[range, Tensor]]
    lengths: Tensor
    kept: list[int]
    last: Tensor


class Decoder:
    """Layers, embeddings and head of a Llama on its device."""

    def __init__(self, language: Any, head: nn.Module, stop: frozenset[int]) -> None:
        self.language = language
        self.head = head
        self.stop = stop
        self.layers = len(language.layers)
        self.device: torch.device = next(language.parameters()).device

    @torch.inference_mode()
    def answer(
        self, pictures: Sequence[Tensor], prompts: Sequence[Prompt], dropping: Dropping | None, limit: int
    ) -> list[tuple[list[int], int]]:
        """Greedy answers.

        Args:
            pictures: embeddings of each picture's tokens, [k, hidden].
            prompts: about these pictures; with the same `before` for all prompts of a picture.
            dropping: stage 2, or None.
            limit: tokens of an answer at most.

        Returns:
            Per prompt the answer's tokens without the one that ends it, and how many prompt tokens the layers
            above the prune layer were given.
        """
        if dropping is None:
            run = self._prefill_shared(pictures, prompts)
        else:
            run = self._prefill_dropping(pictures, prompts, dropping)
        return list(zip(self._decode(run, limit), run.kept, strict=True))

    def _prefill_shared(self, pictures: Sequence[Tensor], prompts: Sequence[Prompt]) -> _Run:
        """Everything up to a picture's end is computed once for all its questions."""
        before = {prompt.picture: prompt.before for prompt in prompts}
        prefixes = [
            torch.cat([self._embed(before.get(number, ())), rows]) for number, rows in enumerate(pictures)
        ]
        hidden, valid = _pad(prefixes)
        every, cache = range(self.layers), DynamicCache()
        self._run(every, hidden, _places(valid), _causal(valid), cache)

        owner = torch.tensor([prompt.picture for prompt in prompts], device=self.device)
        cache.batch_select_indices(owner)
        seen, start = valid[owner], valid.sum(1)[owner]
        hidden, valid = _pad([self._embed(prompt.after) for prompt in prompts])
        mask = torch.cat([seen[:, None, None, :].expand(-1, -1, valid.shape[1], -1), _causal(valid)], -1)
        hidden = self._run(every, hidden, start[:, None] + _places(valid), mask, cache)
        lengths = start + valid.sum(1)
        return _Run(
            cache,
            [(every, torch.cat([seen, valid], 1))],
            lengths,
            lengths.tolist(),
            hidden[torch.arange(len(prompts)), valid.sum(1) - 1],
        )

    def _prefill_dropping(
        self, pictures: Sequence[Tensor], prompts: Sequence[Prompt], dropping: Dropping
    ) -> _Run:
        """The layers below the prune layer see every token, those above it the kept ones."""
        sequences = [
            torch.cat([self._embed(p.before), pictures[p.picture], self._embed(p.after)]) for p in prompts
        ]
        hidden, valid = _pad(sequences)
        places, cache = _places(valid), DynamicCache()
        below, above = range(dropping.prune_layer), range(dropping.prune_layer, self.layers)
        with self._captured(dropping.prune_layer - 1) as captured:
            hidden = self._run(below, hidden, places, _causal(valid), cache)
        rows, kept = self._kept(captured, valid, places, pictures, prompts, dropping)

        counts = kept.tolist()
        hidden, stays = _pad(list(hidden[valid][rows].split(counts)))
        positions, _ = _pad(list(places[valid][rows].split(counts)))
        hidden = self._run(above, hidden, positions, _causal(stays), cache)
        return _Run(
            cache,
            [(below, valid), (above, stays)],
            valid.sum(1),
            counts,
            hidden[torch.arange(len(prompts)), stays.sum(1) - 1],
        )

    def _kept(
        self,
        captured: dict[str, Tensor],
        valid: Tensor,
        places: Tensor,
        pictures: Sequence[Tensor],
        prompts: Sequence[Prompt],
        dropping: Dropping,
    ) -> tuple[Tensor, Tensor]:
        """The rows of all prompts, end to end, that stay, [kept]; and how many of each prompt, [B]."""
        protected, length, kept = [], [], []
        shares = shares_of(dropping.kv, [PruneLayer(dropping.prune_layer)])
        scope = scope_of(dropping.kv, shares)
        for prompt in prompts:
            tokens = len(pictures[prompt.picture])
            ids = [*prompt.before, *[0] * tokens, *prompt.after]
            mask = protected_positions(
                ids, [(len(prompt.before), tokens)], dropping.special_ids, scope, dropping.window
            )
            protected.append(mask)
            length.append(len(ids))
            kept += tokens_kept(len(ids), tokens, int(mask.sum()), shares)
        start = np.cumsum([0, *length[:-1]])
        # only prompts that lose tokens are rated: those are longer than the window
        rated = np.array(kept) < length
        buckets = make_buckets(start[rated], np.array(length)[rated], np.array(kept)[rated])
        pruned = PrunedPrompts(
            rows=sum(length),
            rows_kept=sum(kept),
            protected=torch.from_numpy(np.concatenate(protected)).to(self.device),
            buckets=tuple(
                Bucket(padded, *torch.from_numpy(facts).to(self.device)) for padded, facts in buckets
            ),
        )
        rating = RATINGS[dropping.relevance]
        attention = self.language.layers[dropping.prune_layer - 1].self_attn
        size = attention.head_dim
        q, k = (captured[name].unflatten(-1, (-1, size)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        if dropping.relevance == "random":
            generator = torch.Generator(self.device).manual_seed(0)
            q, k = (torch.empty_like(x).normal_(generator=generator) for x in (q, k))
        elif rating.rotary:
            q, k = apply_rotary_pos_emb(q, k, *self.language.rotary_emb(captured["q_proj"], places))
        rows = kept_rows(
            q.transpose(1, 2)[valid],
            k.transpose(1, 2)[valid],
            pruned,
            relevance=rating,
            queries=rating.queries(dropping.window),
            total_heads=q.shape[1],
            scale=size**-0.5,
        )
        return rows, torch.tensor(kept)

    def _decode(self, run: _Run, limit: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in run.kept]
        ended = [False] * len(answers)
        last = run.last
        for step in range(limit):
            tokens = self.head(self.language.norm(last)).argmax(-1)
            for number, token in enumerate(tokens.tolist()):
                ended[number] |= token in self.stop
                if not ended[number]:
                    answers[number].append(token)
            if all(ended) or step == limit - 1:
                break
            hidden = self.language.embed_tokens(tokens)[:, None]
            places = (run.lengths + step)[:, None]
            for number, (layers, valid) in enumerate(run.segments):
                valid = torch.cat([valid, valid.new_ones(len(answers), 1)], 1)
                run.segments[number] = (layers, valid)
                hidden = self._run(layers, hidden, places, valid[:, None, None], run.cache)
            last = hidden[:, 0]
        return answers

    def _run(
        self, layers: range, hidden: Tensor, places: Tensor, mask: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Run [B, L, hidden] through some layers at the given positions [B, L], True in `mask` is seen."""
        rotary = self.language.rotary_emb(hidden, places)
        for index in layers:
            hidden = self.language.layers[index](
                hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache
            )
        return hidden

    def _embed(self, ids: Sequence[int]) -> Tensor:
        embedded: Tensor = self.language.embed_tokens(
            torch.tensor(ids, dtype=torch.int64, device=self.device)
        )
        return embedded

    @contextmanager
    def _captured(self, index: int) -> Iterator[dict[str, Tensor]]:
        """A layer's query and key projections, [B, L, heads * head_dim] each, while it runs."""
        captured: dict[str, Tensor] = {}
        attention = self.language.layers[index].self_attn

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
                captured[name] = output

            return getattr(attention, name).register_forward_hook(hook)

        handles = [keep("q_proj"), keep("k_proj")]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack [n_b, ...] into [B, L, ...] with zeros behind, and which places are real, [B, L]."""
    padded = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]


def _places(valid: Tensor) -> Tensor:
    return torch.arange(valid.shape[1], device=valid.device).expand_as(valid)


def _causal(valid: Tensor) -> Tensor:
    """[B, 1, L, L]: a place sees the real places up to itself."""
    side = valid.shape[1]
    return valid[:, None, None] & torch.ones(side, side, dtype=torch.bool, device=valid.device).tril()
