# SPDX-License-Identifier: Apache-2.0
"""Tiny random checkpoints of the families, of true structure: what vLLM and transformers load like any other.

    python -m tests.helpers.family_checkpoints OUT [NAME ...]

One token per byte and the special tokens. The weights are larger than usual, so that attention is far from
uniform and a wrong position or row shows in the tokens; head sizes of tower and decoder differ. With
`published` a checkpoint has the tiles, patches and pixel limits of the published models, and as many vision
tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from benchmarks.llava import CHAT_TEMPLATE, byte_tokenizer

QWEN_TOKENS = ("<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IDS = {
    "vision_start_token_id": 1,
    "vision_end_token_id": 2,
    "image_token_id": 3,
    "video_token_id": 4,
}


def tokenizer(special: tuple[str, ...], image: str, **attributes: Any) -> PreTrainedTokenizerFast:
    """One token per byte behind the special ones; a chat template with `image` for each picture."""
    return byte_tokenizer(
        special,
        CHAT_TEMPLATE.replace("<image>", image),
        eos_token=special[0],
        pad_token=special[0],
        **({"additional_special_tokens": list(special[1:])} | attributes),
    )


def text_config(special: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(special) + 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        **more,
    }


def mrope(section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}


def randomise(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln_q" in name:
                parameter.copy_(1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise)
            elif "embed_tokens" in name or "pos_embed" in name or "position_embedding" in name:
                parameter.copy_(0.5 * noise)
            else:
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
                parameter.copy_(1.3 * noise / fan_in**0.5)


def save(folder: Path, model: Any, processor: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    randomise(model)
    model.float().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


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
    config = LlavaNextConfig(
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
    config = LlavaOnevisionConfig(
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
    config = LlavaConfig(
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
        vision_config={**_TILE, "image_size": [side, side], "patch_size": [14, 14]},
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

    Published ones bring their configuration class along; that of a descendant, Qianfan-OCR, has the same
    fields and is part of vLLM.
    """
    source = internvl(folder / "hf", published=published)
    found = json.loads((source / "config.json").read_text())
    vision = found["vision_config"]
    text = {**found["text_config"], "tie_word_embeddings": found["tie_word_embeddings"]}
    config = {
        "model_type": "qianfan_ocr",
        "architectures": ["InternVLChatModel"],
        "vision_config": {
            **{name: vision[name] for name in ("hidden_size", "intermediate_size", "layer_norm_eps")},
            **{name: vision[name] for name in ("num_hidden_layers", "num_attention_heads")},
            "image_size": vision["image_size"][0],
            "patch_size": 14,
            "qkv_bias": vision["attention_bias"],
            "qk_normalization": vision["use_qk_norm"],
        },
        "text_config": text,
        "downsample_ratio": 0.5,
        "force_image_size": vision["image_size"][0],
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12 if published else 6,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
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
    vision = PixtralVisionConfig(**{**_TILE, "image_size": longest}, head_dim=16)
    config = Mistral3Config(
        vision_config=vision, text_config=text, image_token_index=1, spatial_merge_size=2, dtype="float32"
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


LLAVA_TOKENS = ("<|endoftext|>", "<image>", "<video>")
_TILE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def _clip(side: int) -> Any:
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**{**_TILE, "image_size": side}, projection_dim=32)


def _siglip(side: int) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(**{**_TILE, "image_size": side}, vision_use_head=False)


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


CHECKPOINTS: dict[str, Callable[..., Path]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "llava_siglip": llava_siglip,
    "qwen3_5": qwen3_5,
    "internvl": internvl,
    "internvl_chat": internvl_chat,
    "mistral3": mistral3,
}

if __name__ == "__main__":
    for chosen in sys.argv[2:] or CHECKPOINTS:
        print(CHECKPOINTS[chosen](Path(sys.argv[1]) / chosen))
