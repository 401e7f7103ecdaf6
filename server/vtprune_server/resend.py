# SPDX-License-Identifier: Apache-2.0
"""Sends an image, or a video, again that the engine turns out not to have.

vLLM's processor cache has a half in the API process, which knows what the engine has, and the engine's half,
which has it (`vllm.multimodal.cache`). A request whose image is known names it by hash alone. The halves
evict on their own, and requests that fail or are aborted between them set them apart, so now and then the
engine does not have it; vLLM then drops the hash from the first half and answers 500 so that the client tries
again (`EngineCoreProc._handle_mm_cache_miss`). Here the server tries again, before anything was answered.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

from vllm.multimodal.inputs import MultiModalKwargsItems

from vtprune_server import metrics

# The second time the images travel along, unless another request made them known again in between.
_ATTEMPTS = 3


class ResendableImages(MultiModalKwargsItems[Any]):
    """The images of a prompt (``mm_kwargs`` of `vllm.inputs.MultiModalInput`), some named by hash alone.

    They carry what sends them again, and not the prompt, since vLLM hands them on where it builds a prompt
    anew (beam search does, `BeamSearchSequence.get_prompt`).

    Attributes:
        render: renders the prompt once more, with whatever images vLLM's cache then lacks.
    """

    render: Callable[[], Awaitable[Mapping[str, Any]]]


def make_resendable(prompt: dict[str, Any], render: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    """Let the images of a rendered prompt be sent again where one of them has no data.

    Args:
        prompt: changed in place.
        render: renders it once more.
    """
    if any(item is None for items in prompt["mm_kwargs"].values() for item in items):
        images = ResendableImages(prompt["mm_kwargs"])
        images.render = render
        prompt["mm_kwargs"] = images


def install_resend(engine_client: Any) -> None:
    """Wrap `AsyncLLM.generate`, through which every route of the front end generates."""
    generate = engine_client.generate

    async def generate_again(prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        for attempt in range(1, _ATTEMPTS + 1):
            images = _resendable(prompt)
            last = attempt == _ATTEMPTS or images is None
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
            assert images is not None
            metrics.RESENT.inc()
            # the images alone: the tokens of a beam have grown since its prompt was rendered
            prompt = {**prompt, "mm_kwargs": (await images.render())["mm_kwargs"]}

    def generate_or_again(prompt: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        if _resendable(prompt) is not None:
            return generate_again(prompt, *args, **kwargs)
        outputs: AsyncGenerator[Any, None] = generate(prompt, *args, **kwargs)
        return outputs

    engine_client.generate = generate_or_again


def _resendable(prompt: Any) -> ResendableImages | None:
    images = prompt.get("mm_kwargs") if isinstance(prompt, Mapping) else None
    return images if isinstance(images, ResendableImages) else None


def _is_empty_error(output: Any) -> bool:
    """Whether a `RequestOutput` says that its request failed before the first token."""
    return any(one.finish_reason == "error" for one in output.outputs) and not any(
        one.token_ids for one in output.outputs
    )
