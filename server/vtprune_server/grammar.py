# SPDX-License-Identifier: Apache-2.0
"""Says so where a structured output cannot be spelt with the model's vocabulary.

Where the grammar allows none of the vocabulary's tokens vLLM samples one all the same, finds that the grammar
rejects it (`Scheduler.update_from_output`) and ends the request as failed, which its handlers answer with a
500. What the answer must look like is the client's to choose, so here it is a 400.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.exceptions import VLLMValidationError

UNSPELLABLE = (
    "The structured output asked for (response_format, structured_outputs or a tool's schema) has no "
    "continuation in this model's vocabulary, which lacks characters that it needs: leave it out, or ask for "
    "words that the model knows."
)


def install_grammar_errors(engine_client: Any) -> None:
    """Wrap `AsyncLLM.generate`, through which every route of the front end generates."""
    generate = engine_client.generate

    async def explained(prompt: Any, params: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(generate(prompt, params, *args, **kwargs)) as outputs:
            async for output in outputs:
                if _rejected(output):
                    raise VLLMValidationError(UNSPELLABLE, parameter="structured_outputs")
                yield output

    def generate_or_explain(
        prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        structured = getattr(sampling_params, "structured_outputs", None) is not None
        outputs: AsyncGenerator[Any, None] = (explained if structured else generate)(
            prompt, sampling_params, *args, **kwargs
        )
        return outputs

    engine_client.generate = generate_or_explain


def _rejected(output: Any) -> bool:
    """Whether a `RequestOutput` ends as failed with a token; one that failed before has none."""
    return any(one.finish_reason == "error" and len(one.token_ids) > 0 for one in output.outputs)
