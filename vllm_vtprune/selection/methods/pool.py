# SPDX-License-Identifier: Apache-2.0
"""The smaller picture, in token space: a baseline every rule must beat."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod
from vllm_vtprune.selection.methods.uniform import even_grid, rows_used
from vllm_vtprune.selection.ops import membership


class Pool(SelectionMethod):
    """Averages the patches over the cells of an even grid, whatever the picture shows.

    What downscaling is to a tower that takes pictures of one size only: every token stays in the sum and
    detail is lost evenly. Downscaling beats many published rules (VTC-Bench, arXiv 2510.07143). The cells are
    those whose middles `uniform` keeps, and a cell's mean stands where its middle stands.
    """

    name = "pool"

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """The means of `counts[b]` cells."""
        grid = pruning.features.grid
        return [_pool(patches, grid, k) for patches, k in zip(pruning.features.patches, counts, strict=True)]


def _pool(patches: Tensor, grid: tuple[int, int], count: int) -> Selection:
    members = membership(cells(grid, count, patches.device), count)
    means = members @ patches.float() / members.sum(dim=1, keepdim=True)
    return Selection(even_grid(grid, count, patches.device), means.to(patches.dtype))


def cells(grid: tuple[int, int], count: int, device: torch.device) -> Tensor:
    """[N] int64: the cell, 0 to count - 1, of each patch of `grid` (rows, columns), in raster order.

    Bands of rows as even as can be, each cut into cells as even as can be; bands differ by at most one cell.
    A patch belongs where its middle lies.
    """
    height, width = grid
    lines = rows_used(height, width, count)
    patch = torch.arange(height * width, device=device)
    row, column = patch // width, patch % width
    line = (2 * row + 1) * lines // (2 * height)
    first = -(-(line * count) // lines)  # ceil: the band's first cell
    length = -(-((line + 1) * count) // lines) - first
    return first + (2 * column + 1) * length // (2 * width)
