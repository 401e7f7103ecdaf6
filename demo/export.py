# SPDX-License-Identifier: Apache-2.0
"""Write the trained model as a LLaVA folder that vLLM and transformers load like any other."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from benchmarks.llava import llava_processor, save_weights
from demo.model import PAD, SPECIALS, START, TOKEN_PATTERN, VOCABULARY, Size
from vtprune_eval.scenes import PATCH

LIMIT_BYTES = 16_000_000
"""Largest `model.safetensors` that may be shipped."""
_TEXT_PARTS = "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
_IMAGE_PARTS = "{% for part in content if part['type'] in ('image', 'image_url') %}<image>\n{% endfor %}"
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% elif message['role'] == 'user' %}USER: {% endif %}"
    "{% if content is string %}{{ content }}{% else %}" + _IMAGE_PARTS + _TEXT_PARTS + "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's own form, `USER: <image>\\n question ASSISTANT:`; pictures come before their message's text."""


def tokenizer(
    vocabulary: dict[str, int] = VOCABULARY, special: Sequence[str] = ("<image>", "USER:", "ASSISTANT:")
) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words; words it does not know become `<unk>`, and `<s>` starts every text."""
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("colour", "color")])
    words.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), "removed", invert=True)
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", START)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=SPECIALS[PAD],
        additional_special_tokens=list(special),
    )


def processor(size: Size) -> LlavaProcessor:
    """Tokenizer, picture preparation and chat template in one."""
    mean, std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    made: LlavaProcessor = llava_processor(
        tokenizer(), size.image, PATCH, CHAT_TEMPLATE, image_mean=mean, image_std=std
    )
    return made


def check_size(model: torch.nn.Module, dtype: torch.dtype, limit: int) -> None:
    """Refuse weights that would take more bytes than may be shipped.

    Raises:
        ValueError: they would.
    """
    weight_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if weight_bytes > limit:
        raise ValueError(
            f"{weight_bytes} bytes of weights exceed {limit}: make the model smaller or use bfloat16."
        )


def export(
    model: LlavaForConditionalGeneration, size: Size, folder: Path, dtype: torch.dtype = torch.float32
) -> None:
    """Write weights, configuration, tokenizer, processor and chat template into `folder`.

    Raises:
        ValueError: the weights would exceed `LIMIT_BYTES`.
    """
    check_size(model, dtype, LIMIT_BYTES)
    stored = copy.deepcopy(model)
    # Trained as one with the word embedding, stored as two: both libraries then load it without special care.
    stored.lm_head.weight = torch.nn.Parameter(stored.lm_head.weight.detach().clone())
    save_weights(stored, folder, dtype)
    processor(size).save_pretrained(folder)
