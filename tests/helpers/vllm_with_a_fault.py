# SPDX-License-Identifier: Apache-2.0
"""vLLM's API server, in which a request of one seed fails where nobody foresaw it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

FAULTY_SEED = 4711
#: The error's text, as if it quoted the prompt.
FAULT = "zanzibar"


def break_output_of_faulty_requests() -> None:
    """Have `AsyncLLM.generate` raise after its first output."""
    from vllm.v1.engine.async_llm import AsyncLLM

    generate = AsyncLLM.generate

    async def breaking(
        self: AsyncLLM, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> AsyncIterator[Any]:
        async for output in generate(self, prompt, params, *args, **kwargs):
            yield output
            if params.seed == FAULTY_SEED:
                raise RuntimeError(FAULT)

    AsyncLLM.generate = breaking  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    break_output_of_faulty_requests()
    main()
