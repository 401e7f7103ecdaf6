# SPDX-License-Identifier: Apache-2.0
"""Sends an image again that the engine turns out not to have.

vLLM's processor cache has a half in the API process, which knows what the engine has, and the engine's half,
which has it (`vllm.multimodal.cache`). A request whose image is known names it by hash alone. The halves
evict on their own, and requests that fail or are aborted between them set them apart, so now and then the
engine does not have it; vLLM then drops the hash from the first half and answers 500 so that the client tries
again (`EngineCoreProc._handle_mm_cache_miss`). Here the server tries again, before anything was answered; not
for beam search, which builds prompts of its own (`BeamSearchSequence.get_prompt`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from vtprune_server import metrics

# The second time the images travel along, unless another request made them known again in between.
_ATTEMPTS = 3


class Resendable(dict[str, Any]):
    """A rendered prompt (`vllm.inputs.MultiModalInput`) that names an image by its hash alone.

    Attributes:
        render: renders its images once more, with whatever vLLM's cache then lacks.
    """

    render: Callable[[], Awaitable[Mapping[str, Any]]]

    @classmethod
    def of(
        cls, rendered: dict[str, Any], render: Callable[[], Awaitable[Mapping[str, Any]]]
    ) -> dict[str, Any]:
        """`rendered`, resendable if it has an image without data."""
        if all(item is not None for item in rendered["mm_kwargs"].get("image", [])):
            return rendered
        prompt = cls(rendered)
        prompt.render = render
        return prompt

    async def again(self) -> dict[str, Any]:
        """The prompt with its images rendered once more."""
        return Resendable.of({**self, **await self.render()}, self.render)


def install_resend(engine_client: Any) -> None:
    """Wrap `AsyncLLM.generate`, through which every route of the front end generates."""
    generate = engine_client.generate

    async def generate_again(prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        for attempt in range(1, _ATTEMPTS + 1):
            last = attempt == _ATTEMPTS or not isinstance(prompt, Resendable)
            missed = started = False
            async with aclosing(generate(prompt, *args, **kwargs)) as outputs:
                async for output in outputs:
                    missed = not (last or started) and _is_empty_error(output)
                    if missed:
                        break
                    started = True
                    yield output
            if not missed:
                return
            metrics.RESENT.inc()
            prompt = await prompt.again()

    def generate_or_again(prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        if isinstance(prompt, Resendable):
            return generate_again(prompt, *args, **kwargs)
        outputs: AsyncGenerator[Any, None] = generate(prompt, *args, **kwargs)
        return outputs

    engine_client.generate = generate_or_again


def _is_empty_error(output: Any) -> bool:
    """Whether a `RequestOutput` says that its request failed before the first token."""
    return any(one.finish_reason == "error" for one in output.outputs) and not any(
        one.token_ids for one in output.outputs
    )
