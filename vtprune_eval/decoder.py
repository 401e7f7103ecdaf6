# SPDX-License-Identifier: Apache-2.0
"""Greedy answers from a LLaVA's decoder on transformers, many prompts at once, with stage 2 inside.

Counts and choice of stage 2 are the engine's own (`vllm_vtprune.kv_drop.shares` and `.relevance`); the layers
are transformers'. Prompts are padded on the right and masked, positions are each prompt's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_vtprune.kv_drop.gate import text_states
from vllm_vtprune.kv_drop.schedule import PruneLayer
from vtprune_eval.borders import RATINGS, Borders, Dropping, Prompt


@dataclass
class _Run:
    """Prompts on their way: the cache, and which of its entries count in which layers."""

    cache: DynamicCache
    segments: list[tuple[range, Tensor]]
    lengths: Tensor
    kept: list[list[int]]
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
    ) -> list[tuple[list[int], list[int]]]:
        """Greedy answers.

        Args:
            pictures: embeddings of each picture's tokens, [k, hidden].
            prompts: about these pictures; with the same `before` for all prompts of a picture.
            dropping: stage 2, or None.
            limit: tokens of an answer at most.

        Returns:
            Per prompt the answer's tokens without the one that ends it, and how many prompt tokens each
            band above a prune layer was given; without stage 2 the prompt's length.
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
            [[length] for length in lengths.tolist()],
            hidden[torch.arange(len(prompts)), valid.sum(1) - 1],
        )

    def _prefill_dropping(
        self, pictures: Sequence[Tensor], prompts: Sequence[Prompt], dropping: Dropping
    ) -> _Run:
        """The layers below the first prune layer see every token, those above each the ones kept there."""
        sequences = [
            torch.cat([self._embed(p.before), pictures[p.picture], self._embed(p.after)]) for p in prompts
        ]
        hidden, valid = _pad(sequences)
        places, cache, lengths = _places(valid), DynamicCache(), valid.sum(1)
        borders = Borders(prompts, [len(rows) for rows in pictures], dropping, self.device)
        segments, first = [], 0
        for index, border in enumerate(dropping.shares):
            band, rating = range(first, border.layer), borders.rating_at(index)
            with self._captured(border.layer - 1) as captured:
                hidden = self._run(band, hidden, places, _causal(valid), cache)
            segments.append((band, valid))
            reaching = borders.at(index)
            if rating is not None:
                scale = self.language.layers[border.layer - 1].self_attn.head_dim ** -0.5
                queries, keys = self._queries_and_keys(captured, border.layer - 1, places, rating.rotary)
                borders.rate(index, queries[valid], keys[valid], reaching, scale)
            if reaching.cuts:
                rows, counts = borders.keep(reaching), borders.kept[index].tolist()
                stays = list(hidden[valid][rows].split(counts))
                places, _ = _pad(list(places[valid][rows].split(counts)))
                hidden, valid = _pad(stays)
            first = border.layer
        band = range(first, self.layers)
        hidden = self._run(band, hidden, places, _causal(valid), cache)
        last = hidden[torch.arange(len(prompts)), valid.sum(1) - 1]
        return _Run(cache, [*segments, (band, valid)], lengths, borders.kept.T.tolist(), last)

    def _queries_and_keys(
        self, captured: Mapping[str, Tensor], index: int, places: Tensor, rotary: bool
    ) -> tuple[Tensor, Tensor]:
        """A layer's queries and keys, [B, L, heads, head_dim] each, with or without rotary embedding."""
        size = self.language.layers[index].self_attn.head_dim
        q, k = (captured[name].unflatten(-1, (-1, size)).transpose(1, 2) for name in ("q_proj", "k_proj"))
        if rotary:
            q, k = apply_rotary_pos_emb(q, k, *self.language.rotary_emb(captured["q_proj"], places))
        return q.transpose(1, 2), k.transpose(1, 2)

    @torch.inference_mode()
    def ratings(
        self, pictures: Sequence[Tensor], prompts: Sequence[Prompt], window: int, relevance: str = "attention"
    ) -> list[Tensor]:
        """How relevant each visual token would be at every prune layer, were nothing dropped below.

        Args:
            pictures: see `answer`.
            prompts: see `answer`; each longer than the window.
            window: last prompt tokens that rate the others.
            relevance: a name of `RATINGS`.

        Returns:
            Per prompt the scores at prune layers 1 to the last, [layers - 1, visual tokens].
        """
        sequences = [
            torch.cat([self._embed(p.before), pictures[p.picture], self._embed(p.after)]) for p in prompts
        ]
        hidden, valid = _pad(sequences)
        places = _places(valid)
        shares = (PruneLayer(1, 0.5, "vision"),)
        dropping = Dropping(shares, "vision", window, (relevance,), frozenset())
        by_layer = []
        for index in range(self.layers - 1):
            borders = Borders(prompts, [len(rows) for rows in pictures], dropping, self.device)
            with self._captured(index) as captured:
                hidden = self._run(range(index, index + 1), hidden, places, _causal(valid), None)
            queries, keys = self._queries_and_keys(captured, index, places, RATINGS[relevance].rotary)
            scale = self.language.layers[index].self_attn.head_dim ** -0.5
            rated = borders.rate(0, queries[valid], keys[valid], borders.at(0), scale)
            by_layer.append(rated.split(valid.sum(1).tolist()))
        seen = [slice(len(p.before), len(p.before) + len(pictures[p.picture])) for p in prompts]
        return [torch.stack([scores[n][place] for scores in by_layer]).cpu() for n, place in enumerate(seen)]

    @torch.inference_mode()
    def text_states(
        self, pictures: Sequence[Tensor], prompts: Sequence[Prompt], layers: Sequence[int]
    ) -> Tensor:
        """What DyVTE's gate reads below some layers (arXiv 2411.19628), nothing dropped.

        Args:
            pictures: see `answer`.
            prompts: see `answer`.
            layers: rising; the states are those that layer reads.

        Returns:
            [layers, B, 2 * hidden].
        """
        sequences = [
            torch.cat([self._embed(p.before), pictures[p.picture], self._embed(p.after)]) for p in prompts
        ]
        hidden, valid = _pad(sequences)
        mask, places, ends = _causal(valid), _places(valid), valid.sum(1).tolist()
        found, first = [], 0
        for layer in layers:
            hidden = self._run(range(first, layer), hidden, places, mask, None)
            states = []
            for row, prompt, end in zip(hidden, prompts, ends, strict=True):
                states.append(text_states(row[end - len(prompt.after) : end]))
            found.append(torch.stack(states))
            first = layer
        return torch.stack(found)

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
        self, layers: range, hidden: Tensor, places: Tensor, mask: Tensor, cache: DynamicCache | None
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
