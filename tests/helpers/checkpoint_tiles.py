# SPDX-License-Identifier: Apache-2.0
"""Tiny random InternVLs in both formats, and a Mistral-Small 3, of true structure."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoint_parts import TILE, save, text_config, tokenizer

_INTERNVL_TOKENS = ("<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")


def internvl(folder: Path, *, published: bool = False) -> Path:
    """Tiles of 4x4 patches, halved; a thumbnail behind them."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        Qwen2Config,
    )

    special = _INTERNVL_TOKENS
    side, most = (448, 12) if published else (56, 6)
    config = InternVLConfig(
        vision_config={**TILE, "image_size": [side, side], "patch_size": [14, 14]},
        text_config=Qwen2Config(**text_config(special)),
        image_token_id=3,
        image_seq_length=(side // 28) ** 2,
        downsample_ratio=0.5,
        dtype="float32",
    )
    size = {"height": side, "width": side}
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokens = tokenizer(
        special, "<IMG_CONTEXT>", extra_special_tokens=dict(zip(names, special[1:], strict=True))
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=most),
        tokens,
        InternVLVideoProcessor(size=size),
        image_seq_length=(side // 28) ** 2,
        chat_template=tokens.chat_template,
    )
    return save(folder, InternVLForConditionalGeneration(config), processor)


def internvl_chat(folder: Path, *, published: bool = False) -> Path:
    """The weights of `internvl`, kept in the folder's "hf", under the chat format's names.

    As published, it brings its configuration class along: it loads where remote code is trusted.
    """
    source = internvl(folder / "hf", published=published)
    found = json.loads((source / "config.json").read_text())
    vision, text = found["vision_config"], found["text_config"]
    config = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "vision_config": {
            **{name: vision[name] for name in ("hidden_size", "intermediate_size", "layer_norm_eps")},
            **{name: vision[name] for name in ("num_hidden_layers", "num_attention_heads")},
            "image_size": vision["image_size"][0],
            "patch_size": 14,
            "qkv_bias": vision["attention_bias"],
            "qk_normalization": vision["use_qk_norm"],
        },
        "llm_config": text,
        # vLLM hands the outer one on to the language model
        "tie_word_embeddings": found["tie_word_embeddings"],
        "downsample_ratio": 0.5,
        "force_image_size": vision["image_size"][0],
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12 if published else 6,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    code = Path(__file__).with_name("configuration_internvl_chat.py")
    (folder / code.name).write_text(code.read_text())
    tensors = load_file(source / "model.safetensors")
    named: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name and "vision_tower" in name:
            parts = [tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            named[_chat_name(name.replace("q_proj", "qkv"))] = torch.cat(parts)
        elif "vision_tower" not in name or (".k_proj." not in name and ".v_proj." not in name):
            named[_chat_name(name)] = tensor.contiguous()
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    tokens = (*_INTERNVL_TOKENS[:-1], "<|video_pad|>")
    tokenizer(tokens, "<image>").save_pretrained(folder)
    return folder


def _chat_name(name: str) -> str:
    for old, new in (
        ("vision_tower.", "vision_model."),
        ("multi_modal_projector.layer_norm.", "mlp1.0."),
        ("multi_modal_projector.linear_1.", "mlp1.1."),
        ("multi_modal_projector.linear_2.", "mlp1.3."),
        (".cls_token", ".class_embedding"),
        (".patch_embeddings.projection.", ".patch_embedding."),
        (".position_embeddings", ".position_embedding"),
        (".encoder.layer.", ".encoder.layers."),
        (".attention.projection_layer.", ".attn.proj."),
        (".attention.", ".attn."),
        (".layernorm_before.", ".norm1."),
        (".layernorm_after.", ".norm2."),
        (".lambda_", ".ls"),
    ):
        name = name.replace(old, new)
    return name


def mistral3(folder: Path, *, published: bool = False) -> Path:
    """A Pixtral tower, rows that end in tokens of their own."""
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralImageProcessor,
        PixtralProcessor,
        PixtralVisionConfig,
    )

    longest = 1540 if published else 336
    special = ("</s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    text = MistralConfig(**text_config(special), head_dim=32, sliding_window=None, rms_norm_eps=1e-5)
    vision = PixtralVisionConfig(**{**TILE, "image_size": longest}, head_dim=16)  # type: ignore[call-arg]
    config = Mistral3Config(
        vision_config=vision,
        text_config=text,
        image_token_index=1,
        spatial_merge_size=2,
        tie_word_embeddings=False,
        dtype="float32",
    )
    tokens = tokenizer(special, "[IMG]")
    processor = PixtralProcessor(
        PixtralImageProcessor(patch_size={"height": 14, "width": 14}, size={"longest_edge": longest}),
        tokens,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=tokens.chat_template,
    )
    return save(folder, Mistral3ForConditionalGeneration(config), processor)
