# SPDX-License-Identifier: Apache-2.0
"""An even grid, whatever the picture shows."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod


class Uniform(SelectionMethod):
    """Keeps tokens on a grid as even as the count allows: blind to the content, yet covering the image."""

    name = "uniform"

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """The grid of `counts[b]` tokens for each image."""
        device = pruning.features.patches.device
        return [Selection(even_grid(pruning.features.grid, count, device)) for count in counts]


def even_grid(grid: tuple[int, int], count: int, device: torch.device) -> Tensor:
    """[count] int64, ascending: `count` patches spread over `grid` (rows, columns).

    They lie on evenly spaced rows, as many as make the cells square, and evenly spaced within each; rows
    differ by at most one patch. Integer arithmetic on the device, so nothing is copied to it.
    """
    height, width = grid
    lines = rows_used(height, width, count)
    token = torch.arange(count, device=device)
    line = token * lines // count
    first = -(-(line * count) // lines)  # ceil: the line's first token
    length = -(-((line + 1) * count) // lines) - first
    row = (2 * line + 1) * height // (2 * lines)
    column = (2 * (token - first) + 1) * width // (2 * length)
    return row * width + column


def rows_used(height: int, width: int, count: int) -> int:
    """How many rows hold patches: near sqrt(count * height / width), and enough for `count` to fit."""
    fewest = -(-count // width)
    squarest = round(math.sqrt(count * height / width))
    return min(max(squarest, fewest, 1), height, count)
