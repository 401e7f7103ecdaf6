# SPDX-License-Identifier: Apache-2.0
"""Builders of small random LLaVA checkpoints that vLLM and transformers load as they load any LLaVA.

The tokenizer has one token per byte and the special tokens; the weights come from a seed. Random weights
answer nonsense, deterministically, which is all that equality tests need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, LlavaForConditionalGeneration, PreTrainedConfig

from benchmarks.llava import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    PAD,
    DecoderShape,
    TowerShape,
    byte_tokenizer,
    decoder_fields,
    llava_config,
    llava_processor,
    save_weights,
)

__all__ = ["BOS", "CHAT_TEMPLATE", "EOS", "IMAGE", "PAD", "edit_config", "random_llava"]


def random_llava(
    folder: Path,
    *,
    image_size: int = 168,
    patch_size: int = 14,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int = 4,
    hidden: int = 128,
    intermediate: int | None = None,
    vision_hidden: int = 64,
    vision_layers: int = 3,
    vocab_size: int | None = None,
    max_positions: int = 4096,
    decoder: str = "llama",
    sliding_window: int | None = None,
    public_names: bool = True,
    weight_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a random LLaVA-1.5 (CLIP tower with CLS, two-layer projector, a decoder) into `folder`.

    Args:
        folder: where to write; made if missing.
        image_size: pixels; an image has (image_size / patch_size)^2 vision tokens (168 / 14: 144; 336 / 14:
            576).
        patch_size: pixels.
        layers: decoder layers.
        heads: query heads of the decoder; hidden / heads is the head size (vLLM's CPU attention takes 32, 64,
            ...).
        kv_heads: key-value heads of the decoder; fewer than `heads` is grouped-query attention.
        hidden: width of the decoder.
        intermediate: width of its feed-forward layers; None is twice `hidden`.
        vision_hidden: width of the tower.
        vision_layers: layers of the tower.
        vocab_size: None is the tokenizer's own size (261); more only adds rows to the embedding tables.
        max_positions: positions of the decoder.
        decoder: `model_type` of the decoder: `llama`, `mistral`, `qwen2`, `qwen3`.
        sliding_window: gives a Mistral sliding-window attention, which stage 2 refuses.
        public_names: name the tower's weights `vision_tower.vision_model.*`, as public checkpoints and vLLM
            do; False leaves what transformers 5 writes, `vision_tower.*`.
        weight_scale: factor on the decoder's initial weights; above 1 makes attention less uniform.
        dtype: of the stored weights.
        seed: of the weights.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    shape = DecoderShape(
        hidden,
        intermediate or 2 * hidden,
        layers,
        heads,
        vocab_size or len(tokenizer),
        kv_heads,
        max_positions,
    )
    text = {**decoder_fields(shape), "initializer_range": 0.02 * weight_scale}
    tower = TowerShape(vision_hidden, 2 * vision_hidden, vision_layers, 2, image_size, patch_size)
    config = llava_config(_text_config(decoder, text, sliding_window), tower)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.model.language_model.named_parameters():
        # they start at one and nought, which would hide one that is missing
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
        elif name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    save_weights(model, folder, dtype, public_names=public_names)
    llava_processor(tokenizer, image_size, patch_size, CHAT_TEMPLATE).save_pretrained(folder)
    return folder


def edit_config(folder: Path, changes: Mapping[str, object]) -> Path:
    """Change top-level fields of the checkpoint's config.json; returns the folder."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2))
    return folder


def _text_config(decoder: str, fields: Mapping[str, Any], sliding_window: int | None) -> PreTrainedConfig:
    more: dict[str, Any] = {}
    if decoder == "mistral":  # 4096 unless said
        more["sliding_window"] = sliding_window
    if decoder == "qwen3":  # 128 unless said
        more["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    config: PreTrainedConfig = CONFIG_MAPPING[decoder](**fields, **more)
    return config
