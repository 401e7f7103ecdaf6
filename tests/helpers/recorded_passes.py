# SPDX-License-Identifier: Apache-2.0
"""Captures a tower's passes without a device: a stand-in for `torch.cuda.CUDAGraph` and nothing else.

A replay runs what was captured once more, on the memory of the capture: addresses are fixed, what lies there
is of the present pass, and the next one overwrites the results, as on a device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class RecordedGraph:
    """In the place of a `torch.cuda.CUDAGraph`; counts replays."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run, self.replays = run, 0

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():
            self.run()


class Recorder:
    """In the place of `vllm_vtprune.vision.captured.CudaGraphs`.

    Attributes:
        graphs: what was captured, in that order.
    """

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    def __call__(self, run: Callable[[], None], device: torch.device) -> RecordedGraph:
        run()
        self.graphs.append(RecordedGraph(run))
        return self.graphs[-1]

    @property
    def replays(self) -> int:
        """How often any of them was replayed."""
        return sum(graph.replays for graph in self.graphs)
