# SPDX-License-Identifier: Apache-2.0
"""Refuses, before the engine sees it, a request whose KV settings cannot be read or served.

The HTTP front end judges its requests earlier and names the field; this is for `vllm.LLM` and whoever else
fills `SamplingParams.extra_args`.
"""

from __future__ import annotations

from typing import Any

from vllm_vtprune.errors import SettingsError
from vllm_vtprune.kv_drop.hooks.requests import prompt_logprobs_of
from vllm_vtprune.settings import KVSettings


def install_request_check() -> None:
    """Wrap `current_platform.validate_request`, idempotently.

    Hook: `vllm.v1.engine.input_processor.InputProcessor.process_inputs` calls it for each request and lets
    what it raises reach the caller.
    """
    from vllm.platforms import current_platform

    validate = current_platform.validate_request
    if getattr(validate, "checks_kv_settings", False):
        return

    def validate_request(processed_inputs: Any, params: Any) -> None:
        validate(processed_inputs, params)
        check_request(params)

    validate_request.checks_kv_settings = True  # type: ignore[attr-defined]
    setattr(current_platform, "validate_request", validate_request)  # noqa: B010 - mypy forbids assigning


def check_request(params: Any) -> None:
    """Judge what `params` (`SamplingParams`) itself asks for.

    The operator's default is not held against it: where that drops tokens and the request cannot be served
    so, it is served whole, and counted.

    Raises:
        VLLMValidationError: settings that cannot be read, or together with log-probabilities of the prompt.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        settings = KVSettings.from_extra_args(getattr(params, "extra_args", None), KVSettings())
    except SettingsError as error:
        raise VLLMValidationError(str(error), parameter=error.param) from error
    if settings.drops and prompt_logprobs_of(params) is not None:
        name = "prompt_logprobs" if params.prompt_logprobs is not None else "prompt_logprob_token_ids"
        raise VLLMValidationError(
            f"Dropped tokens have no log-probabilities: leave {name} out, or kv_keep.", parameter=name
        )
