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
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
)

from benchmarks.models import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, byte_tokenizer

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
    text = {
        "vocab_size": vocab_size or len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": intermediate or 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.02 * weight_scale,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=2 * vision_hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=2,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=vision_hidden,
        ),
        text_config=_text_config(decoder, text, sliding_window),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).to(dtype)
    for name, parameter in model.model.language_model.named_parameters():
        # they start at one and nought, which would hide one that is missing
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
        elif name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    config.dtype = dtype
    model.save_pretrained(folder)
    if public_names:
        _rename_tower(folder / "model.safetensors")
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
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


def _rename_tower(path: Path) -> None:
    from safetensors.torch import load_file

    old, new = "vision_tower.", "vision_tower.vision_model."
    tensors = {
        new + name[len(old) :] if name.startswith(old) and not name.startswith(new) else name: tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
