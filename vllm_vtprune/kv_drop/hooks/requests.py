# SPDX-License-Identifier: Apache-2.0
"""From vLLM's requests to plans: what scheduler and worker hand to `budget`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_vtprune.kv_drop.plan import KVDropConfig, PromptPlan, plan_prompt, protected_positions, settings_of
from vllm_vtprune.kv_drop.step import RequestDrop

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.sampling_params import SamplingParams


def placeholder_ranges(mm_features: Sequence[MultiModalFeatureSpec]) -> list[tuple[int, int]]:
    """(offset, length) of each image's tokens, from `Request.mm_features` or `NewRequestData.mm_features`."""
    return [
        (f.mm_position.offset, f.mm_position.length) for f in mm_features if f.modality != "prompt_embeds"
    ]


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
) -> RequestDrop | None:
    """What a worker keeps of a request; None where nothing is dropped."""
    plan = plan_request(token_ids, mm_features, sampling_params, config)
    if plan.dropped == 0 or token_ids is None or sampling_params is None:
        return None
    settings, _ = settings_of(sampling_params.extra_args, config.default)
    protected = protected_positions(
        token_ids, placeholder_ranges(mm_features), config.special_ids, settings, config.window
    )
    return RequestDrop(plan.tokens, plan.dropped, protected)
