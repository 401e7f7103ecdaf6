# SPDX-License-Identifier: Apache-2.0
"""Answers the families' cases with vLLM's `LLM`, alone and then with the plugin, and writes what came out.

    python -m tests.helpers.family_run NAME CHECKPOINT OUT PLACEHOLDER ROOM [MODALITY_LEFT_OUT ...]

Both engines run in this process, one after the other. vLLM remembers the class it found for a path, so the
second engine is given the checkpoint by another path.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_PLUGINS"] = ""  # the plugin is registered by hand, once vLLM alone has answered
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from vllm import LLM, SamplingParams

from tests.helpers.family_cases import SQUARE, UNPRUNED, UNPRUNED_VIDEO_FAMILY, WITH_VIDEO, cases
from tests.helpers.family_oracle import Oracle, Request
from vllm_vtprune import engine_kwargs, request_kwargs

STEPS = 16
#: The family that is given embeddings too.
GIVEN = "qwen3_vl"
_PARAMS = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True, logprobs=0)


def engine(checkpoint: str, **options: Any) -> LLM:
    limits = {"image": 4, **({"video": 0} if "video" in options.pop("modalities", ()) else {})}
    return LLM(
        checkpoint,
        enforce_eager=True,
        max_num_seqs=8,
        limit_mm_per_prompt=limits,
        seed=0,
        trust_remote_code=True,
        **options,
    )


def ask(llm: LLM, requests: list[Request], placeholder: str, *, pruning: bool) -> list[dict[str, Any]]:
    prompts: list[Any] = []
    for request in requests:
        text = request.text.format(*[placeholder] * len(request.images))
        prompt: dict[str, Any] = {"prompt": text.replace("<video>", placeholder.replace("image", "video"))}
        # some families take frames alone
        told = "vision_start" in placeholder
        videos = [video if told else video[0] for video in request.videos]
        data = {"image": list(request.images), "video": videos}
        if data := {modality: items for modality, items in data.items() if items}:
            prompt["multi_modal_data"] = data
            if pruning:
                amount = {"keep_ratio": request.keep_ratio, "aggressiveness": request.aggressiveness or None}
                kwargs, _ = request_kwargs(method=request.method, **amount)
                prompt["mm_processor_kwargs"] = kwargs
        prompts.append(prompt)
    return [answer(output) for output in llm.generate(prompts, _PARAMS, use_tqdm=False)]


def ask_about_embeddings(llm: LLM, checkpoint: Path, placeholder: str) -> list[dict[str, Any]]:
    """`UNPRUNED`'s question about `SQUARE`, as a picture and as what the reference makes of it."""
    (request,) = (request for request in UNPRUNED if request.images == (SQUARE,))
    rows = Oracle(checkpoint).embeddings(SQUARE)
    side = 2 * round(len(rows) ** 0.5)
    given = {"image_embeds": rows, "image_grid_thw": torch.tensor([[1, side, side]])}
    kwargs, _ = request_kwargs(keep_ratio=0.1)
    prompt: Any = {
        "prompt": request.text.format(placeholder),
        "multi_modal_data": {"image": given},
        "mm_processor_kwargs": kwargs,
    }
    (output,) = llm.generate([prompt], _PARAMS, use_tqdm=False)
    return [*ask(llm, [request], placeholder, pruning=True), answer(output)]


def answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "cached": output.num_cached_tokens,
        "tokens": tokens,
        "logprobs": [step[t].logprob for step, t in zip(completion.logprobs, tokens, strict=True)],
    }


def describe(model: Any) -> dict[str, Any]:
    """Run on the engine's model."""
    vision = ("visual", "vision", "projector", "mlp1")
    return {
        "class": type(model).__name__,
        "tower_parameters": [n for n, _ in model.named_parameters() if any(v in n for v in vision)],
        "deepstack": getattr(model, "use_deepstack", None),
    }


def main() -> None:
    name, folder, out, placeholder, tokens, *modalities = sys.argv[1:]
    checkpoint, room = Path(folder), int(tokens)
    pruned, unpruned = cases(name)
    found: dict[str, Any] = {}
    model_type = json.loads((checkpoint / "config.json").read_text())["model_type"]
    # a hybrid decoder has a precision and blocks of its own
    hybrid = model_type == "qwen3_5"
    given: dict[str, Any] = {"dtype": "bfloat16"} if hybrid else {"dtype": "float32", "block_size": 32}
    given |= {"modalities": modalities, "max_model_len": room}
    llm = engine(str(checkpoint), **given)
    found["alone"] = ask(llm, unpruned, placeholder, pruning=False)
    videos = WITH_VIDEO if name == UNPRUNED_VIDEO_FAMILY else []
    # one by one, so that both engines compute with the same shapes
    found["videos_alone"] = [ask(llm, [request], placeholder, pruning=False) for request in videos]
    del llm
    gc.collect()

    import vllm_vtprune

    vllm_vtprune.register()
    link = Path(out).parent / "checkpoint"
    link.symlink_to(checkpoint, target_is_directory=True)
    # embeddings of the caller's own, which the engine takes without a tower
    embeds = {"enable_mm_embeds": True} if model_type == GIVEN else {}
    # few blocks and short steps: requests are preempted, and prompts are prefilled in chunks. vLLM makes room
    # for one picture of as many tokens as a step or its estimate has, too low for a small OneVision
    few = {} if hybrid else {"num_gpu_blocks_override": room // 32 + 1}
    llm = engine(
        str(link),
        max_num_batched_tokens=192 if model_type == "llava_onevision" else 64,
        disable_log_stats=False,
        **given,
        **few,
        **embeds,
        **engine_kwargs(score="received"),  # the score that the reference has for every family
    )
    from tests.helpers import family_run as importable

    found["model"] = llm.apply_model(importable.describe)[0]
    if embeds:
        found["given"] = ask_about_embeddings(llm, checkpoint, placeholder)
    everything = [*pruned, *unpruned]
    found["videos"] = [ask(llm, [request], placeholder, pruning=True) for request in videos]
    half = [dataclasses.replace(request, keep_ratio=0.5) for request in videos]
    found["videos_pruned"] = [ask(llm, [request], placeholder, pruning=True) for request in half]
    found["mixed"] = ask(llm, everything, placeholder, pruning=True)
    # each twice in a row: the second time its prompt lies in the prefix cache
    pairs = [
        ask(llm, [request], placeholder, pruning=True) + ask(llm, [request], placeholder, pruning=True)
        for request in everything
    ]
    found["again"] = [second for _, second in pairs]
    found["preemptions"] = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")  # type: ignore[attr-defined]
    torch.save(found, out)


if __name__ == "__main__":
    main()
