# SPDX-License-Identifier: Apache-2.0
"""Tiny random LLaVAs beyond the first, of true structure: tiles, SigLIP towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.helpers.checkpoint_parts import TILE, save, text_config, tokenizer

LLAVA_TOKENS = ("<|endoftext|>", "<image>", "<video>")


def llava_next(folder: Path, *, published: bool = False) -> Path:
    """A CLIP tower; tiles with padding on either side."""
    from transformers import (
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    side = 336 if published else 56
    pinpoints = [[side * r, side * c] for r, c in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]
    config = LlavaNextConfig(  # type: ignore[call-arg]
        vision_config=_clip(side),
        text_config=LlamaConfig(**text_config(LLAVA_TOKENS)),
        image_token_id=1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=pinpoints,
        dtype="float32",
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer(LLAVA_TOKENS, "<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    return public(save(folder, LlavaNextForConditionalGeneration(config), processor))


def llava_onevision(folder: Path, *, published: bool = False) -> Path:
    """A SigLIP tower; pictures of more than nine tiles are shrunk."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
        Qwen2Config,
    )

    side, most = (384, 6) if published else (56, 4)
    pinpoints = [[side * r, side * c] for r in range(1, most + 1) for c in range(1, most + 1)]
    config = LlavaOnevisionConfig(  # type: ignore[call-arg]
        vision_config=_siglip(side),
        text_config=Qwen2Config(**text_config(LLAVA_TOKENS)),
        image_token_id=1,
        video_token_id=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
        image_grid_pinpoints=pinpoints,
        dtype="float32",
    )
    size = {"height": side, "width": side}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer(LLAVA_TOKENS, "<image>"),
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(side // 14) ** 2,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token="<video>",
    )
    return public(save(folder, LlavaOnevisionForConditionalGeneration(config), processor))


def llava_siglip(folder: Path, *, published: bool = False) -> Path:
    """LLaVA-1.5's layout on a SigLIP tower and a Qwen2 decoder."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Config,
        SiglipImageProcessor,
    )

    side = 384 if published else 56
    config = LlavaConfig(  # type: ignore[call-arg]
        vision_config=_siglip(side),
        text_config=Qwen2Config(**text_config(LLAVA_TOKENS)),
        image_token_id=1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        dtype="float32",
    )
    processor = LlavaProcessor(
        SiglipImageProcessor(size={"height": side, "width": side}),
        tokenizer(LLAVA_TOKENS, "<image>"),
        patch_size=14,
        vision_feature_select_strategy="full",
        image_token="<image>",
        num_additional_image_tokens=0,
    )
    return public(save(folder, LlavaForConditionalGeneration(config), processor))


def _clip(side: int) -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**{**TILE, "image_size": side}, projection_dim=32)


def _siglip(side: int) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**{**TILE, "image_size": side}, vision_use_head=False)  # type: ignore[call-arg]


def public(folder: Path) -> Path:
    """Name the weights as public LLaVA checkpoints and vLLM 0.32 do; transformers 5 writes other names."""
    file = folder / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(file).items():
        name = name.removeprefix("model.")
        for old, new in (
            ("vision_tower.vision_model.", "vision_tower.vision_model."),
            ("vision_tower.", "vision_tower.vision_model."),
            ("lm_head.", "language_model.lm_head."),
            ("language_model.model.", "language_model.model."),
            ("language_model.lm_head.", "language_model.lm_head."),
            ("language_model.", "language_model.model."),
        ):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        renamed[name] = tensor
    save_file(renamed, file, metadata={"format": "pt"})
    return folder
