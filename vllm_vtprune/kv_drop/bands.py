# SPDX-License-Identifier: Apache-2.0
"""One engine step above every prune layer: a band's batch is the one below it, less what leaves between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vllm_vtprune.kv_drop.gate import Gate
from vllm_vtprune.kv_drop.geometry import RequestDrop
from vllm_vtprune.kv_drop.step import KVDropState

_NOBODY: NDArray[np.int32] = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class Undecided:
    """A prompt of the present step on which the gate is to decide.

    Attributes:
        row: its request's in the batch.
        end: in the batch that reaches the gate's prune layer, the row after its last token.
        behind: how many rows before `end` are the text behind its pictures.
    """

    row: int
    end: int
    behind: int


class KVDropBands(nn.Module):
    """What model, runner and metadata builders share in a worker. A module, as `KVDropState` is.

    Attributes:
        bands: the present step above each prune layer, from the lowest up.
        profiling: the next dummy run is the one in which vLLM measures memory.
        gate: what decides at the prune layer of index `gate_at`; None without one.
    """

    profiling = False

    def __init__(
        self,
        borders: int,
        max_requests: int,
        max_tokens: int,
        device: torch.device,
        *,
        gate: Gate | None = None,
        gate_at: int | None = None,
    ) -> None:
        super().__init__()
        states = [KVDropState(max_requests, max_tokens, device) for _ in range(borders)]
        self.bands = cast(list[KVDropState], nn.ModuleList(states))
        self.gate = None if gate is None else gate.to(device)
        self.gate_at = gate_at
        for band in self.bands[borders if gate_at is None else gate_at :]:
            band.gated = True
        self._undecided: tuple[Undecided, ...] = ()
        self._decisions: dict[int, bool] = {}
        self._drops: Sequence[Sequence[RequestDrop] | None] = ()
        self._scheduled = self._computed = _NOBODY

    def take_overrun(self) -> list[int]:
        """The rows in `KVDropState.overrun` of any band, each told once."""
        rows = set[int]().union(*(band.overrun for band in self.bands))
        for band in self.bands:
            band.overrun = set()
        return sorted(rows)

    def take_decisions(self) -> dict[int, bool]:
        """What the gate decided in the step, by row: whether visual tokens leave; told once."""
        decisions, self._decisions = self._decisions, {}
        return decisions

    def clear(self) -> None:
        """No request in the batch has lost tokens, as in vLLM's dummy runs."""
        self._undecided = ()
        for band in self.bands:
            band.expect_repeat(False)
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
        self._decisions = {}
        asks = [at for at, drop in enumerate(drops) if self._asks(drop)]
        for index, band in enumerate(self.bands):
            # what is below the gate's prune layer does not depend on it
            band.expect_repeat(bool(asks) and index >= cast(int, self.gate_at))
            band.begin([None if drop is None else drop[index] for drop in drops], scheduled, computed)
        self._undecided = tuple(self._question(at, drops) for at in asks)
        if asks:
            self._drops, self._scheduled, self._computed = drops, scheduled, computed.copy()

    def _asks(self, drop: Sequence[RequestDrop] | None) -> bool:
        if drop is None or self.gate_at is None:
            return False
        question = drop[self.gate_at].gate
        return question is not None and question.leaves is None

    def _question(self, row: int, drops: Sequence[Sequence[RequestDrop] | None]) -> Undecided:
        assert self.gate_at is not None
        drop, step = cast(Sequence[RequestDrop], drops[row])[self.gate_at], self.bands[self.gate_at].step
        assert drop.gate is not None and step is not None
        return Undecided(row, int(step.starts[row]) + drop.reaching, drop.gate.behind)

    @property
    def undecided(self) -> tuple[Undecided, ...]:
        """The prompts of the step on which the gate is still to decide."""
        return self._undecided

    def decide(self, leaves: Sequence[bool]) -> dict[str, Any]:
        """Have the gate's decisions hold from its prune layer on, in this step and for good.

        Args:
            leaves: whether the visual tokens leave, for each of `undecided`.

        Returns:
            New attention metadata by layer; empty where nothing leaves.
        """
        assert self.gate_at is not None
        for case, leaving in zip(self._undecided, leaves, strict=True):
            drops = cast(Sequence[RequestDrop], self._drops[case.row])
            question = drops[self.gate_at].gate
            assert question is not None
            question.leaves = leaving
            self._decisions[case.row] = leaving
            if leaving:
                for index in range(self.gate_at, len(drops)):
                    drops[index].leave(here=index == self.gate_at)
        self._undecided = ()
        metadata: dict[str, Any] = {}
        if any(leaves):
            for index in range(self.gate_at, len(self.bands)):
                of_band = [None if drop is None else drop[index] for drop in self._drops]
                metadata |= self.bands[index].repeat(of_band, self._scheduled, self._computed)
        return metadata
