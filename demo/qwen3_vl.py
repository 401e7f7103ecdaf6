# SPDX-License-Identifier: Apache-2.0
"""A small Qwen3-VL on the demo's pictures: its shape, how pictures enter it, packed questions, its export.

What it has that the demo model has not is what makes pruning without CLS hard to judge on random weights: a
tower without CLS, units of 2x2 patches, a deepstack level and three-dimensional positions. Pictures come at
two resolutions, 36 and 144 units.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import rotate_half
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from demo.export import CHAT_TEMPLATE, check_size, tokenizer
from demo.model import END, IMAGE, PAD, SPECIALS, START, USER, VOCABULARY, VOCABULARY_SIZE
from demo.packing import Packed, pack
from demo.tower import normalise
from vtprune_eval.scene_questions import SceneQuestion
from vtprune_eval.scenes import PATCH

LIMIT_BYTES = 12_000_000
"""Largest `model.safetensors` that may be shipped."""
MERGE = 2
#: Sides of the pictures, in pixels.
SIDES = (168, 336)
VISION_START, VISION_END, VIDEO = range(VOCABULARY_SIZE - 3, VOCABULARY_SIZE)
#: The demo's words, the image token under the name that Qwen's processor looks for.
_WORDS = {word: number for word, number in VOCABULARY.items() if number != IMAGE}
_TOKENS = {
    "<|image_pad|>": IMAGE,
    "<|vision_start|>": VISION_START,
    "<|vision_end|>": VISION_END,
    "<|video_pad|>": VIDEO,
}
PREFIX = (START, USER, VISION_START)
"""Tokens before the picture; behind it stands `VISION_END`."""


@dataclass(frozen=True)
class Shape:
    """The model's dimensions; the default stays below 12 MB in 16 bits."""

    tower_width: int = 128
    tower_layers: int = 5
    tower_heads: int = 4
    text_width: int = 128
    text_layers: int = 6
    text_heads: int = 4


def build(shape: Shape) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL with random weights; input and output embeddings are one."""
    if len(VOCABULARY) > VISION_START:
        raise ValueError(f"the vocabulary's {len(VOCABULARY)} words leave no room for the vision tokens")
    head = shape.text_width // shape.text_heads
    rows = columns = head // 2 // 3
    config = Qwen3VLConfig(
        vision_config={
            "depth": shape.tower_layers,
            "hidden_size": shape.tower_width,
            "intermediate_size": 4 * shape.tower_width,
            "num_heads": shape.tower_heads,
            "out_hidden_size": shape.text_width,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "deepstack_visual_indexes": [shape.tower_layers // 2],
            "num_position_embeddings": (max(SIDES) // PATCH) ** 2,
        },
        text_config={
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": shape.text_width,
            "intermediate_size": 3 * shape.text_width,
            "num_hidden_layers": shape.text_layers,
            "num_attention_heads": shape.text_heads,
            # as many, so that keys can start as queries do (`language.start_on_matches`)
            "num_key_value_heads": shape.text_heads,
            "head_dim": head,
            "max_position_embeddings": 4096,
            "bos_token_id": START,
            "eos_token_id": END,
            "pad_token_id": PAD,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head // 2 - rows - columns, rows, columns],
                "mrope_interleaved": True,
            },
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=True,
    )
    return Qwen3VLForConditionalGeneration(config)


@lru_cache
def unit_patches(side: int) -> Tensor:
    """[units, 4]: the patches of each unit by their raster numbers, in a picture of `side` patches."""
    numbers = torch.arange(side**2).view(side // MERGE, MERGE, side // MERGE, MERGE)
    return numbers.permute(0, 2, 1, 3).reshape(-1, MERGE**2)


def patch_rows(pixels: Tensor) -> Tensor:
    """What the exported image processor makes of uint8 pictures [B, H, W, 3]: [B * patches, values].

    Unit by unit, a picture standing for both of a video's frames, as in
    `transformers.models.qwen2_vl.image_processing_qwen2_vl`.
    """
    images = normalise(pixels)
    batch, channels, height, width = images.shape
    rows, columns = height // PATCH // MERGE, width // PATCH // MERGE
    cut = images.view(batch, channels, rows, MERGE, PATCH, columns, MERGE, PATCH)
    ordered = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4)  # [B * patches, C, P, P]
    return ordered[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1)


@dataclass(frozen=True)
class Looked:
    """The tower's states of `B` pictures of `P` patches, unit by unit, before any merger.

    `patches` [B, P, width] of the last layer, `levels` as many of each deepstack layer.
    """

    patches: Tensor
    levels: list[Tensor]


@dataclass(frozen=True)
class Seen:
    """What the language model is given: `units` [B, N, width], `levels` as many for each deepstack level."""

    units: Tensor
    levels: list[Tensor]

    def kept(self, keep: Tensor) -> Seen:
        """The units in `keep`, [B, K] ascending and -1 behind the shorter ones."""

        def gathered(values: Tensor) -> Tensor:
            return values.gather(1, keep.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1]))

        return Seen(gathered(self.units), [gathered(level) for level in self.levels])


@lru_cache
def _grid(rows: int, columns: int, table_side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the position table and their weights, [P, 4] each, and rows and columns of patches, [2, P]."""
    with torch.inference_mode(False):  # kept, and used where gradients are wanted
        grid = torch.tensor([[1, rows, columns]])
        taps, weights = get_vision_interpolation_indices_and_weights(
            grid, table_side, align_corners=True, spatial_merge_size=MERGE
        )
        return taps, weights, get_vision_position_ids(grid, MERGE)


def look(model: Qwen3VLForConditionalGeneration, pixels: Tensor) -> Looked:
    """Run the tower's layers over uint8 pictures [B, H, W, 3] of one size.

    What `Qwen3VLVisionModel.forward` computes, for pictures of one size side by side: its convolution is a
    product, positions are looked up once for all pictures, and attention is one call. In training that is
    several times as fast on a CPU.
    """
    visual: Any = model.model.visual
    batch, height, width, _ = pixels.shape
    taps, weights, places = _grid(height // PATCH, width // PATCH, visual.num_grid_per_side)
    kernel = visual.patch_embed.proj
    states = F.linear(patch_rows(pixels), kernel.weight.flatten(1), kernel.bias).unflatten(0, (batch, -1))
    states = states + (visual.pos_embed(taps) * weights[..., None]).sum(1)
    cos, sin = (wave[:, None].to(states.dtype) for wave in visual.rotary_pos_emb(states, places))
    levels = []
    for number, block in enumerate(visual.blocks):
        attention = block.attn
        mixed = attention.qkv(block.norm1(states)).unflatten(-1, (3, attention.num_heads, -1))
        query, key, value = mixed.unbind(2)  # [B, P, heads, channels] each
        query, key = (x * cos + rotate_half(x) * sin for x in (query, key))
        seen = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        states = states + attention.proj(seen.transpose(1, 2).flatten(2))
        states = states + block.mlp(block.norm2(states))
        if number in visual.deepstack_visual_indexes:
            levels.append(states)
    return Looked(states, levels)


def merge(model: Qwen3VLForConditionalGeneration, looked: Looked) -> Seen:
    """The mergers: four patches become one unit for the language model, at its input and each level."""
    visual: Any = model.model.visual
    batch = (len(looked.patches), -1)
    mergers = zip(visual.deepstack_merger_list, looked.levels, strict=True)
    return Seen(
        visual.merger(looked.patches.flatten(0, 1)).unflatten(0, batch),
        [merger(level.flatten(0, 1)).unflatten(0, batch) for merger, level in mergers],
    )


def see(model: Qwen3VLForConditionalGeneration, pixels: Tensor) -> Seen:
    """Tower and mergers over uint8 pictures [B, H, W, 3] of one size."""
    return merge(model, look(model, pixels))


def pack_questions(questions: list[list[SceneQuestion]], keep: Tensor) -> Packed:
    """Questions behind the units in `keep`, [B, K] ascending and -1 behind the shorter ones."""
    return pack(questions, (keep >= 0).sum(1).cpu(), keep.device, PREFIX, (VISION_END,))


def positions_of(packed: Packed, keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """[3, B, L]: kept units stand where they do in the whole picture of these rows and columns of units.

    The text goes on behind the picture's longer side, however many of its units stay.
    """
    first, last, columns = len(PREFIX), len(PREFIX) + keep.shape[1], grid[1]
    positions = packed.positions.expand(3, -1, -1).clone()
    units = keep.clamp(min=0)
    places = torch.stack([torch.zeros_like(units), units // columns, units % columns])
    positions[:, :, first:last] = first + places
    positions[:, :, last:] += max(grid) - (keep >= 0).sum(1)[:, None]
    return positions


def answer_logits(
    model: Qwen3VLForConditionalGeneration, kept: Seen, keep: Tensor, grid: tuple[int, int], packed: Packed
) -> Tensor:
    """Logits where an answer is predicted, [asked, vocabulary].

    Args:
        model: what answers.
        kept: the units that are shown, K of each picture.
        keep: their raster numbers in the whole picture, [B, K] ascending, -1 behind the shorter ones.
        grid: rows and columns of the whole picture's units.
        packed: the questions, packed behind `keep`.
    """
    language = model.model.language_model
    first, last = len(PREFIX), len(PREFIX) + keep.shape[1]
    prefix = torch.tensor(PREFIX, device=keep.device).expand(len(keep), -1)
    embed = language.embed_tokens
    inputs = torch.cat([embed(prefix), kept.units, embed(packed.tokens)], 1)
    visual = torch.zeros(inputs.shape[:2], dtype=torch.bool, device=keep.device)
    visual[:, first:last] = True
    states = language(
        inputs_embeds=inputs,
        attention_mask=packed.visible,
        position_ids=positions_of(packed, keep, grid),
        visual_pos_masks=visual,
        deepstack_visual_embeds=[level.flatten(0, 1) for level in kept.levels],
        use_cache=False,
    ).last_hidden_state
    logits: Tensor = model.lm_head(states[packed.asking])
    return logits


def export(model: Qwen3VLForConditionalGeneration, folder: Path, dtype: torch.dtype) -> None:
    """Write weights, configuration, tokenizer, processor and chat template into `folder`.

    Raises:
        ValueError: the weights would exceed `LIMIT_BYTES`.
    """
    check_size(model, dtype, LIMIT_BYTES)
    stored = copy.deepcopy(model).to(dtype)  # type: ignore[arg-type]
    stored.config.dtype = dtype
    stored.save_pretrained(folder)
    processor(SIDES).save_pretrained(folder)


def processor(sides: Sequence[int]) -> Qwen3VLProcessor:
    """Tokenizer, picture preparation and chat template; pictures of these sides keep their size."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor

    means = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    sizes = {"shortest_edge": min(sides) ** 2, "longest_edge": max(sides) ** 2}
    words = tokenizer({**_WORDS, **_TOKENS}, [*_TOKENS, *SPECIALS[USER : USER + 2]])
    template = CHAT_TEMPLATE.replace("<image>\n", "<|vision_start|><|image_pad|><|vision_end|>")
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=PATCH, size=sizes, **means),
        words,
        Qwen3VLVideoProcessor(patch_size=PATCH, size=sizes, **means),
        chat_template=template,
    )
