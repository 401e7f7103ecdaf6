# SPDX-License-Identifier: Apache-2.0
"""Random images and budgets for what every selection method must hold."""

import pytest
import torch
from torch import Tensor

from vllm_vtprune.selection import (
    METHODS,
    VisionFeatures,
)
from vllm_vtprune.settings import VisionSettings

GRID = (6, 8)


TOKENS = GRID[0] * GRID[1]


OPTIONAL = ("cls", "cls_attention", "received", "received_midway", "keys")


# prumerge and prumerge_plus have a count rule of their own under aggressiveness.
OWN_COUNT = {"prumerge", "prumerge_plus"}


every_method = pytest.mark.parametrize("name", METHODS)


budgets = pytest.mark.parametrize(
    "budget",
    [
        VisionSettings(aggressiveness=0.3),
        VisionSettings(aggressiveness=0.5),
        VisionSettings(aggressiveness=0.7, score="cls_attention"),
        VisionSettings(aggressiveness=0.5, score="received", min_tokens=7),
        VisionSettings(keep_ratio=0.22),
        VisionSettings(keep_ratio=0.5, min_tokens=30),
        VisionSettings(keep_ratio=0.98),
        VisionSettings(keep_ratio=0.001),
    ],
    ids=str,
)


def image(seed: int, grid: tuple[int, int] = GRID, dtype: torch.dtype = torch.float32) -> VisionFeatures:
    """One image's random features, with long-tailed attention as vision towers have it."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width, layers = grid[0] * grid[1], 16, 6

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    patches, cls = draw(tokens, width) + draw(1, width), draw(width)
    cls_attention, received = ((2 * draw(layers, tokens)).softmax(-1).to(dtype) for _ in range(2))
    return VisionFeatures(
        patches=patches.to(dtype),
        cls=cls.to(dtype),
        grid=grid,
        seeds=(seed * 0x9E3779B97F4A7C15,),
        cls_attention=cls_attention,
        received=received[:, -1:],
        received_midway=received[:, 1:2],
        keys=draw(tokens, width).to(dtype),
    )


def batch(images: list[VisionFeatures]) -> VisionFeatures:
    fields = {name: torch.cat([getattr(one, name) for one in images]) for name in ("patches", *OPTIONAL)}
    return VisionFeatures(grid=images[0].grid, seeds=tuple(one.seeds[0] for one in images), **fields)
