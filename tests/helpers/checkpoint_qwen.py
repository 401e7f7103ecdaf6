# SPDX-License-Identifier: Apache-2.0
"""Tiny random Qwen-VLs, of true structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from tests.helpers.checkpoint_parts import save, text_config, tokenizer

QWEN_TOKENS = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IDS: dict[str, Any] = {
    "vision_start_token_id": 1,
    "vision_end_token_id": 2,
    "image_token_id": 3,
    "video_token_id": 4,
}
_QWEN3_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": 16,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 64,
}


def mrope(section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}


def qwen2_5_vl(folder: Path, *, published: bool = False) -> Path:
    """Windows of 4x4 patches, one layer with full attention."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "window_size": 112 if published else 56,
            "fullatt_block_indexes": [1, 3],
        },
        text_config=text_config(QWEN_TOKENS, rope_parameters=mrope([4, 6, 6])),
        dtype="float32",
        **QWEN_IDS,
    )
    sizes = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * (16384 if published else 100)}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=14, size=sizes),
        _qwen_tokenizer(),
        Qwen2VLVideoProcessor(patch_size=14, size=sizes),
    )
    return save(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def qwen3_vl(folder: Path, *, published: bool = False) -> Path:
    """Two deepstack levels, interleaved M-RoPE."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = text_config(QWEN_TOKENS, rope_parameters=mrope([6, 5, 5], mrope_interleaved=True), head_dim=32)
    config = Qwen3VLConfig(vision_config=_QWEN3_VISION, text_config=text, dtype="float32", **QWEN_IDS)
    return save(folder, Qwen3VLForConditionalGeneration(config), _qwen3_processor(published))


def qwen3_vl_moe(folder: Path, *, published: bool = False) -> Path:
    """As `qwen3_vl`, with four experts of which two answer."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = text_config(
        QWEN_TOKENS,
        rope_parameters=mrope([6, 5, 5], mrope_interleaved=True),
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,  # twice it is not the hidden size: a wrong layout shows
        norm_topk_prob=True,  # vLLM reads it; transformers always does so
        tie_word_embeddings=False,
    )
    config = Qwen3VLMoeConfig(vision_config=_QWEN3_VISION, text_config=text, dtype="float32", **QWEN_IDS)
    save(folder, Qwen3VLMoeForConditionalGeneration(config), _qwen3_processor(published))
    # public checkpoints, which vLLM reads, hold the experts' weights the other way round
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if ".mlp.experts." in name:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def qwen3_5(folder: Path, *, published: bool = False) -> Path:
    """Three layers of Gated DeltaNet to each with attention, as published; no deepstack.

    Weights of 16 bits, since vLLM's Gated DeltaNet runs on the CPU in bfloat16 alone.
    """
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = text_config(
        QWEN_TOKENS,
        rope_parameters=mrope([3, 3, 2], mrope_interleaved=True, partial_rotary_factor=0.5),
        head_dim=32,
        linear_key_head_dim=128,  # the one that the CPU's kernel knows
        linear_value_head_dim=128,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        tie_word_embeddings=False,
    )
    vision = {k: v for k, v in _QWEN3_VISION.items() if k != "deepstack_visual_indexes"}
    config = Qwen3_5Config(vision_config=vision, text_config=text, dtype="float32", **QWEN_IDS)
    save(folder, Qwen3_5ForConditionalGeneration(config), _qwen3_processor(published))
    file = folder / "model.safetensors"
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    return folder


def _qwen_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer(QWEN_TOKENS, "<|vision_start|><|image_pad|><|vision_end|>")


def _qwen3_processor(published: bool) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    least, most = (64, 16384) if published else (4, 100)
    sizes = {"shortest_edge": 32 * 32 * least, "longest_edge": 32 * 32 * most}
    # equal means, since vLLM alone normalises videos by the image processor's
    means = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16, size=sizes, **means),
        _qwen_tokenizer(),
        Qwen3VLVideoProcessor(patch_size=16, size=sizes, **means),
        chat_template=_qwen_tokenizer().chat_template,
    )
