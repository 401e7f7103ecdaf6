# SPDX-License-Identifier: Apache-2.0
"""The demo model's vocabulary and architecture: a small LLaVA with a CLIP tower, a projector and a Llama."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionModel, LlamaConfig, LlavaForConditionalGeneration

from benchmarks.llava import DecoderShape, TokenIds, TowerShape, decoder_fields, llava_config
from vtprune_eval.scenes import BASE_SIZE, COLOURS, DIGITS, PATCH, PLACES, SHAPES, WORDS

IGNORE = -100
"""Label that no loss counts."""
SPECIALS = ("<unk>", "<s>", "</s>", "<image>", "<pad>", "USER:", "ASSISTANT:")
UNKNOWN, START, END, IMAGE, PAD, USER, ASSISTANT = range(len(SPECIALS))
_QUESTION_WORDS = (
    *("what", "color", "is", "the", "shape", "object", "how", "many", "shapes", "objects", "are", "there"),
    *("where", "text", "a", "an", "yes", "no", "does", "say", "read", "word"),
    *("which", "larger", "higher", "or", "?", ".", ","),
)
# Behind all others, so that their numbers stay those of the shipped checkpoint.
_PAGE_WORDS = (
    *("first", "second", "third", "fourth", "last", "line", "of", "after", "before", "value", "in"),
    *("largest", "smallest"),
)
_PLACE_WORDS = tuple(place for row in PLACES for place in row)
VOCABULARY: dict[str, int] = {
    word: number
    for number, word in enumerate(
        dict.fromkeys(
            (
                *(*SPECIALS, *_QUESTION_WORDS, *COLOURS, *SHAPES, *_PLACE_WORDS, *WORDS, *DIGITS),
                *_PAGE_WORDS,
            )
        )
    )
}
TOKEN_PATTERN = r"[a-z0-9]+(-[a-z]+)?|[^\sa-z0-9]"
"""One token of lower-cased text: a word, a hyphened place, or one other sign."""
VOCABULARY_SIZE = 128


@dataclass(frozen=True)
class Size:
    """The model's dimensions; the default makes 144 patches and stays far below 16 MB."""

    image: int = BASE_SIZE
    tower_width: int = 128
    tower_layers: int = 5
    tower_heads: int = 8
    text_width: int = 128
    text_layers: int = 5
    text_heads: int = 4

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image // PATCH


def words_of(text: str) -> list[int]:
    """Token ids of a question or an answer, as the exported tokenizer makes them."""
    text = text.lower().replace("colour", "color")
    return [VOCABULARY.get(found.group(), UNKNOWN) for found in re.finditer(TOKEN_PATTERN, text)]


def build(size: Size) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights and the tower's attention started on neighbouring patches."""
    tower = TowerShape(
        hidden=size.tower_width,
        intermediate=4 * size.tower_width,
        layers=size.tower_layers,
        heads=size.tower_heads,
        image=size.image,
        patch=PATCH,
    )
    decoder = DecoderShape(
        hidden=size.text_width,
        intermediate=3 * size.text_width,
        layers=size.text_layers,
        heads=size.text_heads,
        vocab=VOCABULARY_SIZE,
        positions=2048,
    )
    text = LlamaConfig(**decoder_fields(decoder, TokenIds(START, END, IMAGE, PAD)))
    model = LlavaForConditionalGeneration(llava_config(text, tower, IMAGE))
    start_on_neighbours(model.model.vision_tower, size)
    return model


@torch.no_grad()
def start_on_neighbours(tower: CLIPVisionModel, size: Size, layers: int = 2, gain: float = 2.5) -> None:
    """Start the first layers' eight heads on the eight neighbouring patches, as a convolution would.

    Sine and cosine of row and column at four frequencies fill 16 channels of the position embedding. A
    query that rotates them by an offset matches the key at that offset, so each head starts as one tap of a
    3x3 filter (Cordonnier et al. 2020, arXiv 1911.03584; d'Ascoli et al. 2021, arXiv 2103.10697). Training
    moves it freely.

    Raises:
        ValueError: the tower's heads cannot hold the 16 channels.
    """
    head = size.tower_width // size.tower_heads
    if size.tower_heads != 8 or head < 16:
        raise ValueError("Starting on the neighbours needs 8 tower heads of at least 16 channels.")
    frequencies = [2 * math.pi / period for period in (24, 12, 6, 4)]
    rows, columns = torch.meshgrid(torch.arange(size.grid), torch.arange(size.grid), indexing="ij")
    waves = [
        f(w * axis.flatten()) for axis in (rows, columns) for w in frequencies for f in (torch.cos, torch.sin)
    ]
    positions = tower.embeddings.position_embedding.weight
    positions[1:, :16] = torch.stack(waves, 1)
    positions[0, :16] = 0
    tower.embeddings.patch_embedding.weight[:16] *= 0.1
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    encoder_layers: list[Any] = list(tower.encoder.layers[:layers])
    for layer in encoder_layers:
        for number, offset in enumerate(offsets):
            rows_of_head = slice(number * head, number * head + 16)
            layer.self_attn.k_proj.weight[rows_of_head, :16] += gain * torch.eye(16)
            layer.self_attn.q_proj.weight[rows_of_head, :16] += gain * _rotation(offset, frequencies)


def _rotation(offset: tuple[int, int], frequencies: list[float]) -> Tensor:
    """Maps the (cos, sin) channels of a patch to those of the patch at this offset, shape [16, 16]."""
    blocks = []
    for step in offset:
        for frequency in frequencies:
            c, s = math.cos(step * frequency), math.sin(step * frequency)
            blocks.append(torch.tensor([[c, -s], [s, c]]))
    rotation: Tensor = torch.block_diag(*blocks)
    return rotation
