# SPDX-License-Identifier: Apache-2.0
"""Methods that rank the tokens and keep the first: a subclass writes only `rank`."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from vllm_vtprune.selection.base import Pruning, Selection, SelectionMethod
from vllm_vtprune.selection.ops import best_first


class RankedMethod(SelectionMethod):
    """Keeps the highest-ranked tokens of each image as they are; equal ranks go to the earlier position."""

    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """The first `counts[b]` tokens by falling rank, back in raster order."""
        return take_first(best_first(self.rank(pruning)), counts)

    @abstractmethod
    def rank(self, pruning: Pruning) -> Tensor:
        """[B, N] of any ordered dtype: the higher, the earlier a token is kept."""


def take_first(order: Tensor, counts: Sequence[int]) -> list[Selection]:
    """Of each image the first `counts[b]` tokens of `order` [B, at least max(counts)], in raster order."""
    return [Selection(row[:count].sort().values) for row, count in zip(order, counts, strict=True)]
