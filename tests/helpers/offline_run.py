# SPDX-License-Identifier: Apache-2.0
"""Generates with vLLM's `LLM` class, with or without the plugin, and writes what came out.

    VLLM_PLUGINS=vtprune python -m tests.helpers.offline_run OUT   (the plugin)
    VLLM_PLUGINS= python -m tests.helpers.offline_run OUT          (vLLM alone)
    VLLM_PLUGINS= python -m tests.helpers.offline_run OUT MODEL    (vLLM alone, MODEL's image embeddings only)

A process of its own for each, since a plugin cannot be unloaded.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from transformers import AutoImageProcessor
from vllm import LLM, SamplingParams

from tests.conftest import DEMO_MODEL
from tests.helpers.pictures import noise, scene
from vllm_vtprune import engine_kwargs, request_kwargs

#: (pictures, question, settings): the unpruned ones come first and are answered by vLLM alone too.
UNPRUNED: list[tuple[list[Any], str]] = [
    ([scene()], "what color is the circle ?"),
    ([scene(30)], "what shape is blue ?"),
    ([noise(1)], "how many objects ?"),
    ([scene(5), noise(2), scene(60)], "is there a red cross ?"),
    ([], "what color is the circle ?"),
]
PRUNED: list[tuple[list[Any], str, dict[str, Any]]] = [
    ([scene()], "what color is the circle ?", {"aggressiveness": 0.5}),
    ([scene()], "what color is the circle ?", {"aggressiveness": 0.9}),
    ([scene()], "what color is the circle ?", {"keep_ratio": 0.25, "method": "random"}),
    ([scene(5), noise(2), scene(60)], "how many objects ?", {"aggressiveness": 0.5}),
    ([scene()], "what color is the circle ?", {"aggressiveness": 0.5}),
]
PARAMS = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "logprobs": 0}


def prompt(images: list[Any], question: str) -> dict[str, Any]:
    """An offline prompt in the demo model's template."""
    text = f"<s>{'<image>' * len(images)}USER: {question} ASSISTANT:"
    return {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}


def pixel_values() -> torch.Tensor:
    """[4, 3, 168, 168]: preprocessed pictures for the comparison of embeddings."""
    processor = AutoImageProcessor.from_pretrained(DEMO_MODEL)
    values: torch.Tensor = processor(
        [scene(), noise(1), scene(30), noise(2)], return_tensors="pt"
    ).pixel_values
    return values


def embeddings(model: Any) -> list[torch.Tensor]:
    """What vLLM's own LLaVA makes of the fixed pixels; run in the worker."""
    return list(model.embed_multimodal(pixel_values=pixel_values()))


def parameter_names(model: Any) -> list[str]:
    """The weights the worker holds; run in the worker."""
    return [name for name, _ in model.named_parameters()]


def main() -> None:
    """Run both lists of prompts, as far as they apply, and save the outputs."""
    # vLLM pickles what it runs in the worker by name, and there this file is not __main__
    from tests.helpers import offline_run as importable

    pruning = "vtprune" in os.environ.get("VLLM_PLUGINS", "").split(",")
    if len(sys.argv) > 2:
        llm = LLM(sys.argv[2], dtype="float32", enforce_eager=True, max_num_seqs=1, max_model_len=512)
        torch.save(llm.apply_model(importable.embeddings)[0], sys.argv[1])
        return
    llm = LLM(
        str(DEMO_MODEL),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=8,
        max_model_len=1024,
        limit_mm_per_prompt={"image": 4},
        **(engine_kwargs() if pruning else {}),
    )
    cases: list[tuple[list[Any], str, dict[str, Any]]] = [(i, q, {}) for i, q in UNPRUNED]
    if pruning:
        cases += PRUNED
    prompts, params = [], []
    for images, question, settings in cases:
        mm_kwargs, extra_args = request_kwargs(**settings)
        entry = prompt(images, question)
        if pruning and images:
            entry["mm_processor_kwargs"] = mm_kwargs
        prompts.append(entry)
        params.append(SamplingParams(**PARAMS, extra_args=extra_args))  # type: ignore[arg-type]
    outputs = llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
    results = [
        {
            "prompt_tokens": len(o.prompt_token_ids or ()),
            "tokens": list(o.outputs[0].token_ids),
            "logprob": o.outputs[0].cumulative_logprob,
        }
        for o in outputs
    ]
    torch.save(
        {
            "results": results,
            "embeddings": None if pruning else llm.apply_model(importable.embeddings)[0],
            "parameters": llm.apply_model(importable.parameter_names)[0],
        },
        sys.argv[1],
    )


if __name__ == "__main__":
    main()
