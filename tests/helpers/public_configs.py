# SPDX-License-Identifier: Apache-2.0
"""The shapes of public checkpoints, as their config.json gives them; no weights."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig, Qwen3VLConfig


def llava_1_5_7b() -> LlavaConfig:
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(vocab_size=32064),
        vision_feature_layer=-2,
    )


def qwen2_5_vl_7b() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text_config={
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "vocab_size": 152064,
        },
    )


def qwen3_vl_8b() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "out_hidden_size": 4096,
            "patch_size": 16,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        text_config={
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 12288,
            "vocab_size": 151936,
            "head_dim": 128,
        },
    )


#: Name -> configuration, and billions of parameters as the checkpoints are published.
PUBLIC: dict[str, tuple[Any, float]] = {
    "llava-1.5-7b": (llava_1_5_7b, 7.06),
    "qwen2.5-vl-7b": (qwen2_5_vl_7b, 8.29),
    "qwen3-vl-8b": (qwen3_vl_8b, 8.77),
}
