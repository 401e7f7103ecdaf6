# SPDX-License-Identifier: Apache-2.0
"""The arm every pruning rule must beat: the same number of tokens by a smaller picture.

A tower that takes pictures of any size is given the smaller picture. A CLIP tower has one size: there the
preprocessed picture is shrunk to rows x columns patches and the tower's position embeddings are interpolated
to that grid (transformers' `interpolate_pos_encoding`), so that each token is still a whole patch of what the
tower sees, in its place of the picture. The method `pool` is the same idea behind the tower. After VTC-Bench
(arXiv 2510.07143), where downscaling beats many published rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vllm_vtprune.families.base import TowerOutput, View
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.features import everything

_BATCH = 32
#: By how much the shape of a smaller picture may differ from the picture's own.
_STRETCH = 4 / 3


class SmallerPictures:
    """Pictures through a CLIP tower at a size of one's choice."""

    def __init__(
        self, encoder: VisionEncoder, images: Sequence[Image.Image], image_processor: object
    ) -> None:
        """Keep what is needed; nothing runs yet.

        Args:
            encoder: the checkpoint's.
            images: P RGB pictures.
            image_processor: the checkpoint's.

        Raises:
            ValueError: the tower takes pictures of many sizes.
        """
        self.encoder, self.images, self.image_processor = encoder, images, image_processor
        grid = encoder.family.unpruned_grid()
        if grid is None:
            raise ValueError("downscale needs a tower whose pictures have one size")
        self._grid = grid

    def embed(self, counts: Sequence[int]) -> list[Tensor]:
        """The embeddings the language model is given, per picture [rows * columns, hidden].

        Args:
            counts: [P] tokens that each picture may have; `smaller_grid` says how near it comes.
        """
        grids = [smaller_grid(self._grid, count) for count in counts]
        embeddings: dict[int, Tensor] = {}
        for grid in sorted(set(grids)):
            members = [picture for picture, of_picture in enumerate(grids) if of_picture == grid]
            for first in range(0, len(members), _BATCH):
                chosen = members[first : first + _BATCH]
                embeddings |= zip(chosen, self._embed(chosen, grid), strict=True)
        return [embeddings[picture] for picture in range(len(grids))]

    @torch.inference_mode()
    def _embed(self, numbers: Sequence[int], grid: tuple[int, int]) -> list[Tensor]:
        encoder, images = self.encoder, [self.images[number] for number in numbers]
        pixels: Tensor = self.image_processor(images=images, return_tensors="pt").pixel_values  # type: ignore[operator]
        patch = pixels.shape[-1] // self._grid[1]
        smaller = F.interpolate(
            pixels, (grid[0] * patch, grid[1] * patch), mode="bicubic", antialias=True, align_corners=False
        ).to(encoder.device, encoder.dtype)
        hidden = encoder.modules["tower"](smaller, interpolate_pos_encoding=True).last_hidden_state
        extra = (encoder.family.places() or 0) - math.prod(self._grid)
        outputs = [
            TowerOutput(states[1:], (View(grid),), states[:1], places=math.prod(grid) + extra)
            for states in hidden
        ]
        return [embeddings for embeddings, _ in encoder.project([everything(o) for o in outputs])]


def smaller_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows and columns of a picture of nearly the shape of `grid` that has nearly `count` patches.

    Of equally near ones the smaller, then the one of truer shape.
    """
    height, width = grid

    def stretch(rows: int, columns: int) -> float:
        return abs(math.log(rows * width / (columns * height)))

    shapes = [
        (rows, columns)
        for rows in range(1, height + 1)
        for columns in range(1, width + 1)
        if stretch(rows, columns) <= math.log(_STRETCH) + 1e-9
    ]
    # a long and narrow grid may have none of its shape that is small enough
    shapes = shapes or [(rows, columns) for rows in range(1, height + 1) for columns in range(1, width + 1)]
    return min(shapes, key=lambda shape: (abs(math.prod(shape) - count), math.prod(shape), stretch(*shape)))
