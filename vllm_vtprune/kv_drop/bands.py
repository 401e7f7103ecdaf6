# SPDX-License-Identifier: Apache-2.0
"""One engine step above every prune layer: a band's batch is the one below it, less what leaves between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vllm_vtprune.kv_drop.step import KVDropState, RequestDrop


class KVDropBands(nn.Module):
    """What model, runner and metadata builders share in a worker. A module, as `KVDropState` is.

    Attributes:
        bands: the present step above each prune layer, from the lowest up.
        profiling: the next dummy run is the one in which vLLM measures memory.
    """

    profiling = False

    def __init__(self, borders: int, max_requests: int, max_tokens: int, device: torch.device) -> None:
        super().__init__()
        states = [KVDropState(max_requests, max_tokens, device) for _ in range(borders)]
        self.bands = cast(list[KVDropState], nn.ModuleList(states))

    def take_overrun(self) -> list[int]:
        """The rows in `KVDropState.overrun` of any band, each told once."""
        rows = set[int]().union(*(band.overrun for band in self.bands))
        for band in self.bands:
            band.overrun = set()
        return sorted(rows)

    def clear(self) -> None:
        """No request in the batch has lost tokens, as in vLLM's dummy runs."""
        for band in self.bands:
            band.clear()

    def begin(
        self,
        drops: Sequence[Sequence[RequestDrop] | None],
        scheduled: NDArray[np.int32],
        computed: NDArray[np.int32],
    ) -> None:
        """Start a step.

        Args:
            drops: per row of the batch, what its request loses at each prune layer; None where it loses
                nothing at any.
            scheduled: see `step_geometry`.
            computed: see `step_geometry`.
        """
        for index, band in enumerate(self.bands):
            band.begin([None if drop is None else drop[index] for drop in drops], scheduled, computed)
