# SPDX-License-Identifier: Apache-2.0
"""A tower's pass as CUDA graphs of few batch sizes, as vLLM's `EncoderCudaGraphManager` does in the engine.

A graph launches all kernels of a pass at once, on the addresses that it was captured with. So pictures are
copied into an input of fixed address, a batch between two sizes is padded up to the larger one, and what
comes out is copied before the next pass overwrites it.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

#: A function of pixel values [B, 3, H, W] whose results are [B, ...] each.
TowerPass = Callable[[Tensor], tuple[Tensor, ...]]

#: How far a result may be from the same pass run as Python, relative to the largest value: a kernel that
#: another batch size or stream chose adds up in another order.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Graph(Protocol):
    """What `torch.cuda.CUDAGraph` is asked for."""

    def replay(self) -> None:
        """Run what was captured once more, on the same memory."""


#: Runs a function without arguments while what it launches on a device is captured.
Record = Callable[[Callable[[], None], torch.device], Graph]


@dataclass(frozen=True)
class Graphs:
    """How passes are captured.

    Attributes:
        largest: most pictures, or tiles, in one graph; a larger batch takes several.
        record: captures; one of its own for each tower.
    """

    largest: int
    record: Record

    @property
    def sizes(self) -> list[int]:
        """The batch sizes captured, ascending: padding is less than a third of a pass."""
        powers = [1 << i for i in range(self.largest.bit_length())]
        sizes = {size for power in powers for size in (power, power + power // 2)}
        return [*sorted(size for size in sizes if size < self.largest), self.largest]


class CudaGraphs:
    """Captures CUDA graphs, all of one tower in one memory pool and on one stream of their own."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, run: Callable[[], None], device: torch.device) -> Graph:
        """Capture; see `Record`."""
        with torch.cuda.device(device):
            if self._stream is None or self._pool is None:
                self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            # libraries make their workspaces, and choose their kernels, outside the graph
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # other threads may allocate meanwhile, which is no part of the graph
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                run()
        return graph


class CapturedPass:
    """A pass in graphs of several batch sizes, which share one input and one set of results.

    Args:
        run: the pass; row by row of its own picture alone.
        example: [1, 3, H, W] on the tower's device and in its dtype.
        graphs: how to capture.

    Raises:
        ValueError: a graph's results are not the pass's.
        RuntimeError: the device refused the capture.
    """

    def __init__(self, run: TowerPass, example: Tensor, graphs: Graphs) -> None:
        self._run = run
        self._sizes = graphs.sizes
        self._input = example.new_zeros((graphs.largest, *example.shape[1:]))
        self._results = tuple(
            result.new_empty((graphs.largest, *result.shape[1:])) for result in run(self._input[:1])
        )
        # the largest first, so that the others find its memory in the pool
        self._graphs = {
            size: graphs.record(partial(self._fill, size), example.device) for size in self._sizes[::-1]
        }
        probe = torch.randn(self._input.shape, generator=torch.Generator().manual_seed(0)).to(example)
        for size in self._sizes:
            if not agree(self(probe[:size]), run(probe[:size])):
                raise ValueError(f"a captured pass of {size} pictures gives other results")

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """The pass's results for any batch, in memory of their own. One thread at a time, on one stream."""
        parts = [self._replay(part) for part in pixel_values.split(self._sizes[-1])]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(rows) for rows in zip(*parts, strict=True))

    def _replay(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        count = len(pixel_values)
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        # the rows behind them hold an earlier pass's pictures, or none
        self._input[:count].copy_(pixel_values)
        self._graphs[size].replay()
        return tuple(result[:count].clone() for result in self._results)

    def _fill(self, size: int) -> None:
        for result, value in zip(self._results, self._run(self._input[:size]), strict=True):
            result[:size].copy_(value)


def agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether a pass's results are another's but for rounding."""
    return len(found) == len(expected) and all(map(_close, found, expected))


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    apart = (found.float() - expected.float()).abs().max()
    # not so where either holds NaN
    return bool(apart <= _TOLERANCE.get(found.dtype, 1e-3) * expected.float().abs().max())
