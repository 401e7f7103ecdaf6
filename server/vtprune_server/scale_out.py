# SPDX-License-Identifier: Apache-2.0
"""vLLM's token-in, token-out route (`--enable-scale-out`) within the operator's policy.

`/inference/v1/generate` takes `SamplingParams` whole, so their `extra_args` could carry any second-stage
settings past the front door. Its requests come from `/v1/*/render`, where headers and body are read; here
what they were resolved to is checked against the caps again, and settings of its own have no place.
"""

from __future__ import annotations

from typing import Any

from vllm_vtprune.contract import KWARG
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.policy import PrunePolicy
from vtprune_server.context import RequestContext, refusal

GENERATE_ROUTE = "/inference/v1/generate"
#: Where a scale-out front end has a prompt rendered; the answer is what the route above takes.
RENDER_ROUTES = (
    "/v1/chat/completions/render",
    "/v1/completions/render",
    "/v1/messages/render",
    "/v1/responses/render",
)


def check_generate(request: Any, context: RequestContext, policy: PrunePolicy) -> None:
    """Judge a request of `GENERATE_ROUTE`.

    Args:
        request: vLLM's `GenerateRequest`.
        context: with its headers and its body's `vtprune` field.
        policy: the operator's.

    Raises:
        VLLMValidationError: settings beyond the caps, or where they do not act.
    """
    try:
        if context.headers.fields or context.body is not None:
            field = next(iter(context.headers.fields), None)
            name = context.headers.name(field) if field is not None else KWARG
            raise SettingsError(
                f"{name} does not act on {GENERATE_ROUTE}: send it where the prompt is rendered, such as "
                f"{RENDER_ROUTES[0]}.",
                name,
            )
        policy.check_extra_args(request.sampling_params.extra_args)
    except SettingsError as error:
        raise refusal(error) from error
