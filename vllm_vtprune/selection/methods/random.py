# SPDX-License-Identifier: Apache-2.0
"""The baseline every rule must beat."""

import torch
from torch import Tensor

from vllm_vtprune.selection.base import Pruning
from vllm_vtprune.selection.ranked import RankedMethod

_MASK64 = (1 << 64) - 1


class Random(RankedMethod):
    """Keeps tokens at random, at the count the settings give.

    The draw depends on the image's seed alone, not on the batch, the device or the count: a smaller choice is
    part of a larger one. Positions are ranked by SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), whose
    finaliser is a
    bijection: no ties.
    """

    name = "random"

    def rank(self, pruning: Pruning) -> Tensor:
        """[B, N] int64, a pseudo-random number for every position."""
        positions = torch.arange(pruning.features.tokens, device=pruning.features.patches.device)
        # Seeds enter as scalar arguments of the kernels; a tensor of them would be a blocking copy to the
        # device.
        return torch.stack([splitmix64(positions, seed) for seed in pruning.features.seeds])


def splitmix64(positions: Tensor, seed: int) -> Tensor:
    """SplitMix64's outputs numbered `positions` (int64) from the low 64 bits of `seed`, as int64."""
    state = (positions + 1) * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    return state ^ _shift_right(state, 31)


def _signed(value: int) -> int:
    """The low 64 bits as torch's int64 holds them; its arithmetic wraps as that of uint64 does."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's own carries the sign down."""
    return (values >> bits) & (_MASK64 >> bits)
