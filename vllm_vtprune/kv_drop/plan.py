# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a prompt stay above the prune layer: the one place that decides it.

Scheduler, worker and front end each call `plan_prompt` with what they know of a request and get the same
answer, so none has to ask another and nothing waits for the accelerator. *Which* of the unprotected tokens
stay is decided on the device (`vllm_vtprune.kv_drop.relevance`).

Nothing here knows of vLLM or torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.errors import SettingsError
from vllm_vtprune.settings import KVSettings
from vllm_vtprune.share import share_of

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
        prune_layer: K; decoder layers 0 to K-1 see the whole prompt, the others the kept tokens.
        window: last prompt tokens that rate the others and always stay.
        special_ids: the tokenizer's special tokens, the image placeholder aside.
        longest_prompt: tokens of the longest prompt that one step can take; longer ones are served unpruned.
        default: what a request gets that says nothing.
        relevance: how tokens are rated; a name of `vllm_vtprune.kv_drop.relevance.RELEVANCE`.
    """

    prune_layer: int
    window: int
    longest_prompt: int
    special_ids: frozenset[int] = frozenset()
    default: KVSettings = field(default_factory=KVSettings)
    relevance: str = "attention"


@dataclass(frozen=True)
class PromptPlan:
    """The verdict on one prompt.

    Attributes:
        tokens: length of the prompt.
        kept: tokens that stay above the prune layer; equal to `tokens` when nothing is dropped.
        unpruned: why the prompt is served whole although the request asked for less; None otherwise.
    """

    tokens: int
    kept: int
    unpruned: Unpruned | None = None

    @property
    def dropped(self) -> int:
        """Tokens that leave at the prune layer."""
        return self.tokens - self.kept

    def blocks_saved(self, block_size: int, groups_above: int) -> int:
        """KV-cache blocks the prompt does not take, summed over the groups above the prune layer."""
        return groups_above * (-(-self.tokens // block_size) + -self.kept // block_size)


def protected_positions(
    token_ids: Sequence[int],
    placeholders: Sequence[tuple[int, int]],
    special_ids: frozenset[int],
    settings: KVSettings,
    window: int,
) -> NDArray[np.bool_]:
    """Positions that stay whatever their relevance.

    The first token, special tokens outside the image placeholders, the last `window` tokens, and with
    ``kv_scope=vision`` every token outside the placeholders. A token counts as an image's by its position,
    never by its id: text can spell the placeholder's token.

    Args:
        token_ids: the prompt, [n].
        placeholders: (offset, length) of each image's tokens.
        special_ids: see `KVDropConfig`.
        settings: the request's.
        window: see `KVDropConfig`.

    Returns:
        Mask, [n].
    """
    n = len(token_ids)
    image = np.zeros(n, dtype=bool)
    for offset, length in placeholders:
        image[offset : offset + length] = True
    if settings.scope == "vision":
        protected = ~image
    else:
        protected = np.isin(np.asarray(token_ids, dtype=np.int64), list(special_ids)) & ~image
    protected[:1] = True
    protected[max(0, n - window) :] = True
    return protected


def tokens_kept(prompt_tokens: int, protected: int, settings: KVSettings) -> int:
    """`max(ceil(r * n), protected)`, at most n."""
    if not settings.drops:
        return prompt_tokens
    return min(prompt_tokens, max(share_of(settings.keep, prompt_tokens), protected))


def kv_tokens_kept(
    token_ids: Sequence[int],
    placeholders: Sequence[tuple[int, int]],
    special_ids: frozenset[int],
    settings: KVSettings,
    window: int,
) -> int:
    """Tokens of a prompt that stay above the prune layer, see `protected_positions` for the arguments."""
    if not settings.drops:
        return len(token_ids)
    protected = protected_positions(token_ids, placeholders, special_ids, settings, window)
    return tokens_kept(len(token_ids), int(protected.sum()), settings)


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
        placeholders: (offset, length) of each image's tokens.
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
    if n > config.longest_prompt:
        return PromptPlan(n, n, "too_long")
    return PromptPlan(n, kv_tokens_kept(token_ids, placeholders, config.special_ids, settings, config.window))


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
