# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 checkpoints of any shape, as public ones are written: random weights, one token per byte.

The demo model's training and the tests build on the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
BOS, EOS, IMAGE, PAD = range(1, 5)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% endfor %}ASSISTANT:"
)
#: The tower's layer whose output feeds the projector, as in LLaVA-1.5: the last but one.
FEATURE_LAYER = -2


@dataclass(frozen=True)
class DecoderShape:
    """Shape of a Llama decoder; `kv_heads` None is as many as `heads`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    kv_heads: int | None = None
    positions: int = 16384


@dataclass(frozen=True)
class TowerShape:
    """Shape of a CLIP tower; `image` and `patch` are in pixels."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image: int = 336
    patch: int = 14


@dataclass(frozen=True)
class TokenIds:
    """Ids of the tokens that the configuration names."""

    bos: int = BOS
    eos: int = EOS
    image: int = IMAGE
    pad: int = PAD


def decoder_fields(decoder: DecoderShape, tokens: TokenIds = TokenIds()) -> dict[str, Any]:
    """The decoder as the fields that all of transformers' decoder configurations share."""
    return {
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.hidden,
        "intermediate_size": decoder.intermediate,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads or decoder.heads,
        "max_position_embeddings": decoder.positions,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
    }


def llava_config(text_config: Any, tower: TowerShape, image_token: int = IMAGE) -> LlavaConfig:
    """A LLaVA-1.5 of a CLIP tower with CLS, a two-layer projector and the decoder of `text_config`."""
    from transformers import CLIPVisionConfig, LlavaConfig

    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        vision_config=CLIPVisionConfig(
            hidden_size=tower.hidden,
            intermediate_size=tower.intermediate,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.image,
            patch_size=tower.patch,
            projection_dim=tower.hidden,
        ),
        text_config=text_config,
        image_token_index=image_token,
        image_seq_length=(tower.image // tower.patch) ** 2,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
    )


def random_llava(folder: Path, decoder: DecoderShape, tower: TowerShape, seed: int = 0) -> None:
    """Write a random LLaVA-1.5 in float32 into `folder`, with the weights that transformers starts from."""
    import torch
    from transformers import LlavaForConditionalGeneration

    config = write_config(folder, decoder, tower, "float32")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    save_weights(model, folder, torch.float32)


def write_config(folder: Path, decoder: DecoderShape, tower: TowerShape, dtype: str) -> LlavaConfig:
    """Write everything but the weights: configuration, byte tokenizer, image processor, chat template."""
    from transformers import LlamaConfig

    config = llava_config(LlamaConfig(**decoder_fields(decoder)), tower)
    config.dtype = dtype
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    llava_processor(byte_tokenizer(), tower.image, tower.patch, CHAT_TEMPLATE).save_pretrained(folder)
    return config


def save_weights(
    model: LlavaForConditionalGeneration, folder: Path, dtype: torch.dtype, *, public_names: bool = True
) -> None:
    """Save a model's configuration and weights.

    Args:
        model: left as it is but for its type, which becomes `dtype`.
        folder: where to.
        dtype: of the stored weights.
        public_names: name the tower's weights as public checkpoints do, which vLLM 0.32 reads; False leaves
            transformers 5's names.
    """
    from safetensors.torch import load_file, save_file

    stored: Any = model.to(dtype)  # type: ignore[arg-type]
    stored.config.dtype = dtype
    stored.save_pretrained(folder)
    if public_names:
        weights = folder / "model.safetensors"
        named = {public_name(name): weight for name, weight in load_file(weights).items()}
        save_file(named, weights, metadata={"format": "pt"})


def public_name(name: str) -> str:
    """The key of a weight in public LLaVA checkpoints; transformers 5 leaves `vision_model.` out."""
    tower, public = "vision_tower.", "vision_tower.vision_model."
    return public + name.removeprefix(tower) if name.startswith(tower) and public not in name else name


def llava_processor(
    tokenizer: PreTrainedTokenizerFast, image: int, patch: int, chat_template: str, **preparation: Any
) -> LlavaProcessor:
    """A `LlavaProcessor`: tokenizer, picture preparation and chat template.

    Args:
        tokenizer: with the token `<image>`.
        image: side of a prepared picture in pixels.
        patch: side of a patch in pixels.
        chat_template: in Jinja.
        preparation: further fields of `CLIPImageProcessor`.
    """
    from transformers import CLIPImageProcessor, LlavaProcessor

    pictures = CLIPImageProcessor(
        size={"shortest_edge": image}, crop_size={"height": image, "width": image}, **preparation
    )
    return LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )


def byte_tokenizer(
    special: Sequence[str] = SPECIAL_TOKENS, chat_template: str = CHAT_TEMPLATE, **named: Any
) -> PreTrainedTokenizerFast:
    """One token per byte: needs no vocabulary file, and a prompt's length does not hang on a merge table.

    Args:
        special: tokens ahead of the bytes', from id 0.
        chat_template: in Jinja.
        named: which of them are what, as `PreTrainedTokenizerFast` takes it; LLaVA's by default.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat_template, **(named or _LLAVA_TOKENS)
    )


_LLAVA_TOKENS: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "additional_special_tokens": ["<image>"],
}
