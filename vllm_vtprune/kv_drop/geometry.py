# SPDX-License-Identifier: Apache-2.0
"""One step's batch above one prune layer: who loses tokens now, who lost some before, where its rows lie.

A request that lost d tokens has every later token d places earlier in the caches above the prune layer. So a
step needs, per request, how many tokens it lost, and for prompts pruned in this very step their extent in the
batch. All of it is known on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class GateQuestion:
    """What the gate decides about one prompt.

    Attributes:
        behind: text tokens behind the prompt's last visual token, at least one.
        leaves: whether the visual tokens leave; None until it is decided, in the prompt's step.
    """

    behind: int
    leaves: bool | None = None


@dataclass
class RequestDrop:
    """What a worker keeps of a request that loses tokens, for one prune layer.

    Attributes:
        tokens: length of the prompt, n.
        dropped: how many have left above this prune layer.
        protected: mask of the positions that stay in any case, [n].
        kept: rows that stayed when the prompt was first pruned, [n - dropped], and the row of its first token
            in that step; a preempted request is prefilled again with exactly these.
        lost: how many of `dropped` left at prune layers below this one.
        rated: whether the prompt is ranked here; a prompt that is not keeps its protected tokens, or all that
            reach this prune layer.
        gate: at the gate's prune layer, what it decides; None elsewhere, and where it is not asked.
    """

    tokens: int
    dropped: int
    protected: NDArray[np.bool_]
    kept: tuple[Tensor, int] | None = None
    lost: int = 0
    rated: bool = True
    gate: GateQuestion | None = None

    @property
    def reaching(self) -> int:
        """Tokens of the prompt that reach this prune layer."""
        return self.tokens - self.lost

    def leave(self, *, here: bool) -> None:
        """All but the protected tokens leave, at this prune layer or, if not `here`, at one below."""
        self.dropped = self.tokens - int(self.protected.sum())
        self.rated = False
        if not here:
            self.lost = self.dropped


@dataclass(frozen=True)
class StepGeometry:
    """A step's batch as the layers above the prune layer see it; R requests, M rows.

    Attributes:
        dropped: tokens each request has lost once the step is done, [R].
        query_start_loc: first row of each request, [R + 1].
        requests: which request each row is of, [M].
        positions: place of each row among its request's kept tokens, [M].
        max_query_len: most rows of one request.
        pruned: indices of the requests whose prompt comes in this step and has lost tokens above.
        starts: first row of each request in the batch below the prune layer, [R].
        reaching: rows of that batch.
    """

    dropped: NDArray[np.int32]
    query_start_loc: NDArray[np.int32]
    requests: NDArray[np.int64]
    positions: NDArray[np.int64]
    max_query_len: int
    pruned: NDArray[np.int64]
    starts: NDArray[np.int64]
    reaching: int

    @property
    def rows(self) -> int:
        """M."""
        return int(self.query_start_loc[-1])


def step_geometry(
    scheduled: NDArray[np.int32],
    computed: NDArray[np.int32],
    dropped: NDArray[np.int32],
    lost: NDArray[np.int32] | None = None,
) -> StepGeometry:
    """Geometry of one step.

    Args:
        scheduled: tokens of each request in this step, [R].
        computed: tokens of each request before it, [R].
        dropped: tokens each request loses in all, [R]. Such a prompt comes whole, so it loses them in the
            step that starts at its first token, and every later step starts beyond the prompt.
        lost: how many of them leave at prune layers below, [R]; None where none do.
    """
    now = (computed == 0) & (dropped > 0)
    rows = scheduled - np.where(now, dropped, 0)
    ends = np.cumsum(rows)
    query_start_loc = np.concatenate([[0], ends]).astype(np.int32)
    first_place = np.where(now, 0, computed - dropped)
    requests = np.repeat(np.arange(len(rows)), rows)
    positions = np.arange(ends[-1]) - (query_start_loc[:-1] - first_place)[requests]
    pruned = np.flatnonzero(now)
    reaching = scheduled if lost is None else scheduled - np.where(now, lost, 0)
    return StepGeometry(
        dropped=dropped,
        query_start_loc=query_start_loc,
        requests=requests,
        positions=positions.astype(np.int64),
        max_query_len=int(rows.max()),
        pruned=pruned.astype(np.int64),
        starts=(np.cumsum(reaching) - reaching).astype(np.int64),
        reaching=int(reaching.sum()),
    )
