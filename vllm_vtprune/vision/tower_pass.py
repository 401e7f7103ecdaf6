# SPDX-License-Identifier: Apache-2.0
"""The passes of a tower whose pictures all have one size: captured as CUDA graphs, traced, or as they are.

Run as Python a pass takes the global lock again after each of some hundred operations, while the front end's
event loop wants it too. On the CPU that cost a tenth of the throughput with a small tower; on a GPU, where
the kernels are asynchronous, launching them is the cost of a pass. A traced pass (`torch.jit.trace`) runs
from end to end without the interpreter, on any device; a captured one (`vision.captured`) is one launch.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from vllm_vtprune.vision.captured import CapturedPass, Graphs, TowerPass, agree

logger = logging.getLogger(__name__)

Outputs = frozenset[str]


class TowerPasses:
    """One pass for each set of optional outputs, made when it is first asked for.

    Args:
        run: the pass, of a tower, a set, and pixel values [B, 3, H, W], any B; its results are [B, ...] each
            and row by row of their own picture alone.
        traced: whether it may be traced; not where its Python depends on B.
    """

    def __init__(
        self, run: Callable[[Any, Outputs, Tensor], tuple[Tensor, ...]], *, traced: bool = True
    ) -> None:
        self._run = run
        self._traced = traced
        self._passes: dict[Outputs, TowerPass] = {}

    def prepare(self, tower: Any, example: Tensor, sets: Collection[Outputs], graphs: Graphs | None) -> None:
        """Make some passes before they are needed.

        Args:
            tower: the one that the passes will be asked for.
            example: [1, 3, H, W] on the tower's device and in its dtype.
            sets: the sets of optional outputs.
            graphs: how to capture them; None: not.
        """
        for outputs in sets:
            captured = None if graphs is None else _captured(self._pass(tower, outputs), example, graphs)
            if captured is not None:
                self._passes[outputs] = captured
            else:
                self._make(tower, example, outputs)

    def __call__(self, tower: Any, pixel_values: Tensor, outputs: Outputs) -> tuple[Tensor, ...]:
        """Results of the pass, in memory that no later pass writes.

        To be called by one thread at a time, in inference mode.
        """
        if outputs not in self._passes:
            self._make(tower, pixel_values[:1], outputs)
        return self._passes[outputs](pixel_values)

    def _pass(self, tower: Any, outputs: Outputs) -> TowerPass:
        # no `functools.partial`, which has no name for `torch.jit.trace`
        return lambda pixel_values: self._run(tower, outputs, pixel_values)

    def _make(self, tower: Any, example: Tensor, outputs: Outputs) -> None:
        run = self._pass(tower, outputs)
        self._passes[outputs] = traced(run, example) if self._traced else run


def traced(run: TowerPass, example: Tensor) -> TowerPass:
    """A pass that the interpreter does not run; the one given, where it cannot be traced.

    Args:
        run: a pass of `TowerPasses`; its tower's weights are never changed again.
        example: [1, 3, H, W].
    """
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            # deprecated in favour of torch.compile, which needs a C++ compiler, and of torch.export, whose
            # module the interpreter runs
            warnings.simplefilter("ignore")
            script: Any = torch.jit.trace(run, example, check_trace=False)
            found = TracedPass(script)
            if not agree(found(example), run(example)):
                raise ValueError("its results are others")
    except Exception as error:
        # the text of a tracing error holds whole weights
        logger.warning(
            "vtprune: the vision tower could not be traced (%s) and runs as Python, slower under load.",
            type(error).__name__,
        )
        return run
    return found


class TracedPass:
    """A traced pass, run as it was traced.

    The graph executor's own optimisations would specialise it for each batch size, and on a GPU fuse and
    compile it, so that rounding differs between the first passes and the later ones.
    """

    def __init__(self, script: Any) -> None:
        self._script = script

    def __call__(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """As a `TowerPass`."""
        jit: Any = torch.jit  # which does not list it
        with jit.optimized_execution(False):
            results: tuple[Tensor, ...] = self._script(pixel_values)
        return results


def _captured(run: TowerPass, example: Tensor, graphs: Graphs) -> CapturedPass | None:
    try:
        with torch.inference_mode():
            captured = CapturedPass(run, example, graphs)
    except Exception as error:
        logger.warning(
            "vtprune: the vision tower could not be captured as CUDA graphs (%s: %s) and runs without them.",
            type(error).__name__,
            str(error).partition("\n")[0][:200],
        )
        return None
    logger.info("vtprune: CUDA graphs of the vision tower, for up to %d pictures at once", graphs.largest)
    return captured
