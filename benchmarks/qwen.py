# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL checkpoints of any shape: random weights, one token per byte, every picture of one size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.llava import DecoderShape, TokenIds, byte_tokenizer, decoder_fields

TOKENS = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\n{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %} {% endfor %}ASSISTANT:"
)
_PATCH, _MERGE = 14, 2
_UNIT = (_PATCH * _MERGE) ** 2


@dataclass(frozen=True)
class WindowTower:
    """Shape of Qwen2.5-VL's tower; its last layer attends over the whole picture, the others in windows."""

    hidden: int
    intermediate: int
    layers: int
    heads: int


def random_qwen2_5_vl(
    folder: Path, decoder: DecoderShape, tower: WindowTower, vision_tokens: int, seed: int = 0
) -> None:
    """Write a random Qwen2.5-VL in float32 into `folder`, with the weights that transformers starts from.

    Args:
        folder: where to.
        decoder: its decoder's shape, which has key and value biases as Qwen2's.
        tower: its tower's.
        vision_tokens: of every picture, to which its processor scales them: a square of square units gives
            square pictures as many, others nearly so.
        seed: of the weights.
    """
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    head = decoder.hidden // decoder.heads
    # time, rows and columns, in the shares of the published models: 16, 24, 24 of 64
    section = [head // 8, 3 * head // 16, 3 * head // 16]
    ids: dict[str, Any] = {name: TOKENS.index(token) for name, token in _NAMED.items()}
    config = Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        vision_config={
            "depth": tower.layers,
            "hidden_size": tower.hidden,
            "intermediate_size": tower.intermediate,
            "num_heads": tower.heads,
            "out_hidden_size": decoder.hidden,
            "patch_size": _PATCH,
            "spatial_merge_size": _MERGE,
            "window_size": 112,
            "fullatt_block_indexes": [tower.layers - 1],
        },
        text_config={
            **decoder_fields(decoder, TokenIds(bos=0, eos=0, pad=0)),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
        },
        dtype="float32",
        **ids,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    folder.mkdir(parents=True, exist_ok=True)
    model.float().save_pretrained(folder)
    sizes = {"shortest_edge": vision_tokens * _UNIT, "longest_edge": vision_tokens * _UNIT}
    tokenizer = byte_tokenizer(
        TOKENS, TEMPLATE, eos_token=TOKENS[0], pad_token=TOKENS[0], additional_special_tokens=list(TOKENS[1:])
    )
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=_PATCH, size=sizes),
        tokenizer,
        Qwen2VLVideoProcessor(patch_size=_PATCH, size=sizes),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


_NAMED = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
