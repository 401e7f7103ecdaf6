# SPDX-License-Identifier: Apache-2.0
"""What the families' tiny checkpoints share: a byte tokenizer, a small decoder, random weights, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from benchmarks.llava import CHAT_TEMPLATE, byte_tokenizer

#: A tower for square tiles.
TILE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


def tokenizer(special: tuple[str, ...], image: str, **attributes: Any) -> PreTrainedTokenizerFast:
    """One token per byte behind the special ones; a chat template with `image` for each picture.

    For each video, the same with its name.
    """
    text = "{% else %}{{ c['text'] }}"
    video = "{% elif c['type'] == 'video' %}" + image.replace("image", "video") + "\n" + text
    return byte_tokenizer(
        special,
        CHAT_TEMPLATE.replace("<image>", image).replace(text, video),
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
