# SPDX-License-Identifier: Apache-2.0
"""From vLLM's requests to plans: what scheduler and worker hand to `plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.kv_drop.geometry import GateQuestion, RequestDrop
from vllm_vtprune.kv_drop.plan import (
    KVDropConfig,
    PromptPlan,
    competing,
    gate_asks,
    plan_prompt,
    reuses,
    settings_of,
    settled_from,
    tail_of,
    text_behind,
)
from vllm_vtprune.kv_drop.relevance import RELEVANCE
from vllm_vtprune.kv_drop.shares import protected_positions, rated_at, scope_of, shares_of

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request


def placeholder_ranges(mm_features: Sequence[MultiModalFeatureSpec]) -> list[tuple[int, int]]:
    """(offset, length) of the visual tokens, from `Request.mm_features` or `NewRequestData.mm_features`."""
    return embedded_ranges(f.mm_position for f in mm_features if f.modality != "prompt_embeds")


def embedded_ranges(placeholders: Iterable[PlaceholderRange]) -> list[tuple[int, int]]:
    """(offset, length) of the tokens that stand for embeddings.

    What else lies in an image's range, as row breaks, tags and start and end tokens do, is text.
    """
    spans = (span for placeholder in placeholders for span in placeholder.extract_embeds_range())
    return [(start, end - start + 1) for start, end in spans]


def prompt_logprobs_of(params: Any) -> int | None:
    """How many log-probabilities of each prompt token `params` (`SamplingParams`) asks for; None for none.

    0 where it scores token ids of its own (`prompt_logprob_token_ids`): that reads every prompt row, too.
    """
    asked: int | None = params.prompt_logprobs
    if asked is None and params.prompt_logprob_token_ids is not None:
        return 0
    return asked


def plan_request(
    token_ids: Sequence[int] | None,
    mm_features: Sequence[MultiModalFeatureSpec],
    sampling_params: SamplingParams | None,
    config: KVDropConfig,
    *,
    num_tokens: int = 0,
    streaming_input: bool = False,
) -> PromptPlan:
    """The plan of a request as the engine holds it. Never raises."""
    if sampling_params is None:  # pooling
        tokens = num_tokens if token_ids is None else len(token_ids)
        return PromptPlan(tokens, tokens)
    settings, unreadable = settings_of(sampling_params.extra_args, config.default)
    plan = plan_prompt(
        token_ids,
        placeholder_ranges(mm_features),
        settings,
        config,
        prompt_logprobs=prompt_logprobs_of(sampling_params),
        has_prompt_embeds=any(f.modality == "prompt_embeds" for f in mm_features),
        streaming_input=streaming_input,
        num_tokens=num_tokens,
    )
    return plan if unreadable is None else PromptPlan(plan.tokens, plan.kept, unreadable)


def request_drop(
    token_ids: Sequence[int] | None,
    mm_features: Sequence[MultiModalFeatureSpec],
    sampling_params: SamplingParams | None,
    config: KVDropConfig,
) -> tuple[RequestDrop, ...] | None:
    """What a worker keeps of a request, per prune layer; None where nothing is dropped, or may be."""
    plan = plan_request(token_ids, mm_features, sampling_params, config)
    if plan.whole or token_ids is None or sampling_params is None:
        return None
    placeholders, protected = _protected(token_ids, mm_features, sampling_params, config)
    reaching = (plan.tokens, *plan.kept_by_layer[:-1])
    inherits = [RELEVANCE[config.relevance_at(index)].inherits for index in range(len(reaching))]
    rated = rated_at(plan.tokens, plan.kept_by_layer, int(protected.sum()), inherits)
    drops = []
    for index, (below, kept) in enumerate(zip(reaching, plan.kept_by_layer, strict=True)):
        drops.append(
            RequestDrop(
                plan.tokens,
                plan.tokens - kept,
                protected,
                lost=plan.tokens - below,
                rated=rated[index],
                gate=GateQuestion(text_behind(plan.tokens, placeholders)) if index == plan.gate else None,
            )
        )
    return tuple(drops)


def first_turn(request: Request, config: KVDropConfig) -> tuple[int, str] | None:
    """Of a request that goes on from its first turn, or may be gone on from: what `reuse.Passages` asks.

    Args:
        request: as the scheduler holds it, of which something is dropped.
        config: the operator's.

    Returns:
        Where its first turn's tokens all stay from (`plan.settled_from`), and what decides which of them
        do; None for another request.
    """
    params = request.sampling_params
    if params is None or request.prompt_token_ids is None:
        return None
    settings, _ = settings_of(params.extra_args, config.default)
    if not reuses(settings, config):
        return None
    _, protected = _protected(request.prompt_token_ids, request.mm_features, params, config)
    shares = shares_of(settings, config.schedule)
    return settled_from(protected), f"{shares} {scope_of(settings, shares)}"


def _protected(
    token_ids: Sequence[int],
    mm_features: Sequence[MultiModalFeatureSpec],
    sampling_params: SamplingParams,
    config: KVDropConfig,
) -> tuple[list[tuple[int, int]], NDArray[np.bool_]]:
    """(offset, length) of the visual tokens, and which tokens stay in any case, of those that may leave."""
    settings, _ = settings_of(sampling_params.extra_args, config.default)
    token_ids, placeholders = competing(token_ids, placeholder_ranges(mm_features), settings, config)
    asks = gate_asks(len(token_ids), placeholders, settings, config)
    scope = scope_of(settings, shares_of(settings, config.schedule), gated=asks)
    tail = tail_of(len(token_ids), placeholders, settings, config)
    return placeholders, protected_positions(token_ids, placeholders, config.special_ids, scope, tail)
