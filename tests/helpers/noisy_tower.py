# SPDX-License-Identifier: Apache-2.0
"""A tower whose rounding differs from pass to pass, as on a device with the company in a batch.

    python -m tests.helpers.noisy_tower OUT

asks a real engine about pictures as several API processes would that share it: each time everything but the
engine's own caches is forgotten, and the rounding may be another.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from tests.conftest import DEMO_MODEL
from tests.helpers.pictures import scene

#: Two units in the last place of bfloat16, which a few layers add up to.
ROUNDING = 2.0**-6
PICTURES = 24
SETTING = {"aggressiveness": 0.23}  # `light`, where the curve is flattest


@contextmanager
def other_rounding(service: Any, seed: int, noise: float = ROUNDING) -> Iterator[None]:
    """Every value that the tower gives is off by a random share of itself, up to half of `noise`."""
    encode = service.encoder.encode
    dice = torch.Generator().manual_seed(seed)

    def off(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * (1 + noise * (torch.rand(tensor.shape, generator=dice) - 0.5))

    def noisy(*args: Any, **kwargs: Any) -> list[Any]:
        outputs = encode(*args, **kwargs)
        return [dataclasses.replace(o, patches=off(o.patches), cls=off(o.cls)) for o in outputs]

    service.encoder.encode = noisy
    try:
        yield
    finally:
        del service.encoder.encode


def forget(service: Any) -> None:
    """What a new API process does not know."""
    service.cache.clear()
    service.outcomes.clear()


def main(out: str) -> None:
    from vllm import LLM, SamplingParams

    from vllm_vtprune import request_kwargs
    from vllm_vtprune.vision.placement import vision_service

    llm = LLM(str(DEMO_MODEL), dtype="float32", enforce_eager=True, max_model_len=512, block_size=32)
    service = vision_service(llm.llm_engine.model_config)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)

    def ask() -> list[dict[str, Any]]:
        answers = []
        for i in range(PICTURES):
            prompt = {
                "prompt": "<s><image>USER: what color is the circle ? ASSISTANT:",
                "multi_modal_data": {"image": [scene(i)]},
                "mm_processor_kwargs": request_kwargs(**SETTING)[0],
            }
            (output,) = llm.generate(prompt, params, use_tqdm=False)
            completion = output.outputs[0]
            answers.append(
                {
                    "prompt_tokens": len(output.prompt_token_ids),
                    "cached": output.num_cached_tokens,
                    "finish": completion.finish_reason,
                    "tokens": list(completion.token_ids),
                    "logprobs": [next(iter(at.values())).logprob for at in completion.logprobs],
                }
            )
        return answers

    def ask_as_a_new_process(seed: int | None) -> list[dict[str, Any]]:
        forget(service)
        llm.llm_engine.reset_mm_cache()
        with other_rounding(service, seed) if seed is not None else nullcontext():
            return ask()

    found = {"plain": ask(), "other": ask_as_a_new_process(1), "plain again": ask_as_a_new_process(None)}
    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()
    found["other alone"] = ask_as_a_new_process(1)
    torch.save(found, out)


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    main(sys.argv[1])
