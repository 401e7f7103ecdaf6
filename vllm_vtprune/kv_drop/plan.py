# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a prompt stay above each prune layer: the one place that decides it.

Scheduler, worker and front end each call `plan_prompt` with what they know of a request and get the same
answer, so none has to ask another and nothing waits for the accelerator. *Which* of the unprotected tokens
stay is decided on the device (`vllm_vtprune.kv_drop.relevance`). The counting itself: `kv_drop.shares`.

Nothing here knows of vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.errors import SettingsError
from vllm_vtprune.kv_drop.schedule import PruneLayer
from vllm_vtprune.kv_drop.shares import protected_positions, scope_of, shares_of, tokens_kept
from vllm_vtprune.settings import KVSettings

#: Why a prompt that asked for dropping is served whole.
Unpruned = Literal["too_long", "prompt_logprobs", "prompt_embeds", "streaming_input", "bad_settings"]
UNPRUNED: tuple[Unpruned, ...] = (
    "too_long",
    "prompt_logprobs",
    "prompt_embeds",
    "streaming_input",
    "bad_settings",
)


@dataclass(frozen=True)
class KVDropConfig:
    """What the operator fixed for stage 2, equal in every process.

    Attributes:
        schedule: the prune layers, from the lowest up; decoder layers below the first see the whole prompt.
        window: last prompt tokens that rate the others and always stay.
        special_ids: the tokenizer's special tokens, the image placeholder aside.
        longest_prompt: tokens of the longest prompt that one step can take; longer ones are served unpruned.
        default: what a request gets that says nothing.
        relevance: how tokens are rated at each prune layer; names of
            `vllm_vtprune.kv_drop.relevance.RELEVANCE`, the last of which holds for the rest.
        gate: index of the prune layer at which a trained gate may let a prompt's visual tokens leave; None
            without one.
        gate_file: where it is read from.
        reuse_block: tokens of a KV-cache block, where later turns go on from what the first one kept: so that
            the tokens behind them begin at a block's edge in every band or in none, whole blocks are dropped.
            0 where they do not.
    """

    schedule: tuple[PruneLayer, ...]
    window: int
    longest_prompt: int
    special_ids: frozenset[int] = frozenset()
    default: KVSettings = field(default_factory=KVSettings)
    relevance: tuple[str, ...] = ("attention",)
    gate: int | None = None
    gate_file: str = ""
    reuse_block: int = 0

    @property
    def prune_layers(self) -> tuple[int, ...]:
        """K of every prune layer, from the lowest up."""
        return tuple(prune_layer.layer for prune_layer in self.schedule)

    def relevance_at(self, index: int) -> str:
        """How tokens are rated at the prune layer of that index."""
        return self.relevance[min(index, len(self.relevance) - 1)]


@dataclass(frozen=True)
class PromptPlan:
    """The verdict on one prompt.

    Attributes:
        tokens: length of the prompt; of a later turn that goes on from the first, of the first turn's.
        kept: tokens that stay above the first prune layer; equal to `tokens` when none leave there.
        unpruned: why the prompt is served whole although the request asked for less; None otherwise.
        kept_above: tokens that stay above each further prune layer.
        gate: index of the prune layer at which the gate is still to decide; None where it does not.
        protected: where it is, the tokens that stay from there on if it lets the others leave.
        behind: tokens of the prompt behind its first turn's, all of which stay; in no other count.
    """

    tokens: int
    kept: int
    unpruned: Unpruned | None = None
    kept_above: tuple[int, ...] = ()
    gate: int | None = None
    protected: int = 0
    behind: int = 0

    @property
    def kept_by_layer(self) -> tuple[int, ...]:
        """Tokens that stay above each prune layer, from the lowest up."""
        return (self.kept, *self.kept_above)

    @property
    def dropped(self) -> int:
        """Tokens that leave at any prune layer."""
        return self.tokens - self.kept_by_layer[-1]

    @property
    def whole(self) -> bool:
        """Whether no token leaves, and none may: such a prompt is served as by vLLM alone."""
        return self.dropped == 0 and self.gate is None

    def decided(self, leaves: bool) -> PromptPlan:
        """The plan once the gate has decided.

        Args:
            leaves: its visual tokens leave at the gate's prune layer.
        """
        if self.gate is None:
            return self
        if not leaves:
            return replace(self, gate=None)
        below, above = self.kept_by_layer[: self.gate], self.kept_by_layer[self.gate :]
        kept, *rest = (*below, *[self.protected] * len(above))
        return replace(self, kept=kept, kept_above=tuple(rest), gate=None)

    def blocks_saved(self, block_size: int, groups: Sequence[int]) -> int:
        """KV-cache blocks the prompt does not take.

        Args:
            block_size: tokens of a block.
            groups: KV-cache groups of the band above each prune layer.
        """
        whole = -(-(self.tokens + self.behind) // block_size)
        kept = [tokens + self.behind for tokens in self.kept_by_layer]
        return sum(n * (whole - -(-tokens // block_size)) for n, tokens in zip(groups, kept, strict=False))


def settled_from(protected: NDArray[np.bool_]) -> int:
    """The first position of a prompt from which on every token stays in any case.

    Args:
        protected: see `shares.protected_positions`, [n].
    """
    competing = np.flatnonzero(~protected)
    return int(competing[-1]) + 1 if len(competing) else 0


def reuses(settings: KVSettings, config: KVDropConfig) -> bool:
    """Whether a prompt goes on from what its first turn kept, and leaves what it keeps to later turns.

    Not at an exit: what stays there is all protected, and not a token more may stay to fill a block.

    Args:
        settings: the request's.
        config: the operator's.
    """
    if not config.reuse_block or not settings.reuse or not settings.drops:
        return False
    return all(share.share > 0 for share in shares_of(settings, config.schedule))


def tail_of(
    tokens: int, placeholders: Sequence[tuple[int, int]], settings: KVSettings, config: KVDropConfig
) -> int:
    """How many of the last tokens of a prompt, or of its first turn, stay in any case.

    The window; for later turns to go on from, whatever was answered, all from the last edge of a block on,
    where that lies in the text behind the pictures.

    Args:
        tokens: the prompt's, or its first turn's.
        placeholders: (offset, length) of each run of visual tokens in them.
        settings: the request's.
        config: the operator's.
    """
    if not reuses(settings, config):
        return config.window
    tail = tokens % config.reuse_block
    if placeholders and tail > text_behind(tokens, placeholders):
        return config.window
    return max(config.window, tail)


def competing(
    token_ids: Sequence[int],
    placeholders: Sequence[tuple[int, int]],
    settings: KVSettings,
    config: KVDropConfig,
) -> tuple[Sequence[int], list[tuple[int, int]]]:
    """The tokens of a prompt that may leave, and their visual ones: all, or its first turn's.

    Args:
        token_ids: the prompt, [n].
        placeholders: (offset, length) of each run of visual tokens.
        settings: the request's.
        config: the operator's.
    """
    end = settings.first_turn
    if not 0 < end < len(token_ids) or not reuses(settings, config):
        return token_ids, list(placeholders)
    return token_ids[:end], [(at, min(length, end - at)) for at, length in placeholders if at < end]


def gate_asks(
    tokens: int, placeholders: Sequence[tuple[int, int]], settings: KVSettings, config: KVDropConfig
) -> bool:
    """Whether the gate decides on a prompt, unless too little is left for it to take away.

    Not where there is no gate or no picture, where no text follows the last picture, which is what the gate
    reads, where the request refuses the gate, or drops nothing at its prune layer.

    Args:
        tokens: length of the prompt.
        placeholders: (offset, length) of each run of visual tokens.
        settings: the request's.
        config: the operator's.
    """
    if config.gate is None or not settings.gate or not placeholders:
        return False
    own = settings.shares[min(config.gate, len(settings.shares) - 1)]
    return own < 1.0 and text_behind(tokens, placeholders) > 0


def text_behind(tokens: int, placeholders: Sequence[tuple[int, int]]) -> int:
    """Tokens of a prompt behind its last visual one.

    Args:
        tokens: length of the prompt.
        placeholders: (offset, length) of each run of visual tokens, at least one.
    """
    return tokens - max(offset + length for offset, length in placeholders)


def plan_prompt(
    token_ids: Sequence[int] | None,
    placeholders: Sequence[tuple[int, int]],
    settings: KVSettings,
    config: KVDropConfig,
    *,
    prompt_logprobs: int | None = None,
    has_prompt_embeds: bool = False,
    streaming_input: bool = False,
    num_tokens: int = 0,
) -> PromptPlan:
    """Decide for one prompt. Never raises: what cannot be pruned is served whole, with the reason.

    Args:
        token_ids: the prompt, [n]; None for a prompt of embeddings alone.
        placeholders: (offset, length) of each run of visual tokens.
        settings: the request's.
        config: the operator's.
        prompt_logprobs: the request's; tokens that left have no log-probability, so it excludes dropping.
        has_prompt_embeds: the prompt, or a part of it, was given as embeddings.
        streaming_input: the prompt may grow while it is served (`Request.resumable` in vLLM).
        num_tokens: length of a prompt whose `token_ids` are None.
    """
    n = num_tokens if token_ids is None else len(token_ids)
    if not settings.drops:
        return PromptPlan(n, n)
    if prompt_logprobs is not None:
        return PromptPlan(n, n, "prompt_logprobs")
    if token_ids is None or has_prompt_embeds:
        return PromptPlan(n, n, "prompt_embeds")
    if streaming_input:
        return PromptPlan(n, n, "streaming_input")
    whole = n
    token_ids, placeholders = competing(token_ids, placeholders, settings, config)
    n = len(token_ids)
    if n > config.longest_prompt:
        return PromptPlan(whole, whole, "too_long")
    shares = shares_of(settings, config.schedule)
    asks = gate_asks(n, placeholders, settings, config)
    scope = scope_of(settings, shares, gated=asks)
    tail = tail_of(n, placeholders, settings, config)
    protected = protected_positions(token_ids, placeholders, config.special_ids, scope, tail)
    visual = sum(length for _, length in placeholders)
    stay = int(protected.sum())
    kept, *above = by_layer = tokens_kept(n, visual, stay, shares)
    if reuses(settings, config):
        kept, *above = (n - (n - left) // config.reuse_block * config.reuse_block for left in by_layer)
    if not asks or by_layer[config.gate or 0] == stay:
        return PromptPlan(n, kept, kept_above=tuple(above), behind=whole - n)
    return PromptPlan(n, kept, kept_above=tuple(above), gate=config.gate, protected=stay)


def gate_report(plan: PromptPlan, leaves: bool) -> dict[str, Any]:
    """What an answer tells of the gate: the decision, and the plan that it was made on, by its counts."""
    return {"leaves": leaves, "tokens": plan.tokens, "kept_by_layer": list(plan.kept_by_layer)}


def decided_plan(plans: Sequence[PromptPlan], report: Mapping[str, Any]) -> int | None:
    """Which of some plans a `gate_report` is of; None where it is of none, or was told before."""
    for number, plan in enumerate(plans):
        if plan.gate is not None and gate_report(plan, report["leaves"]) == report:
            return number
    return None


def settings_of(
    extra_args: Mapping[str, Any] | None, default: KVSettings
) -> tuple[KVSettings, Unpruned | None]:
    """A request's settings out of `SamplingParams.extra_args`, for the engine's side, which must not fail.

    Returns:
        The settings and None; settings that drop nothing and ``bad_settings`` for an entry that cannot be
        read.
    """
    try:
        return KVSettings.from_extra_args(extra_args, default), None
    except SettingsError:
        return KVSettings(), "bad_settings"
