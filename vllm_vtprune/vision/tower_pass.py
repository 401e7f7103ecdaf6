# SPDX-License-Identifier: Apache-2.0
"""One pass of a CLIP or SigLIP tower, with each layer's query and key projections where somebody wants them.

On the CPU the pass is traced (`torch.jit.trace`): it then runs from end to end without the interpreter. Run
as Python it takes the global lock again after each of some hundred operations, while the front end's event
loop wants it too; with a small tower that, and the interpreter's own time, cost a tenth of the throughput.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

TowerPass = Callable[[Tensor], tuple[Tensor, ...]]


def tower_pass(tower: nn.Module, example: Tensor, *, projections: bool) -> TowerPass:
    """The tower as a function of pixel values [B, 3, H, W], any B.

    Args:
        tower: in eval mode, its weights never changed again.
        example: [1, 3, H, W] on the tower's device and in its dtype.
        projections: whether to return them too.

    Returns:
        Gives the last hidden states [B, 1 + N, D]; with `projections` followed by the queries and the keys,
        [B, 1 + N, D] each, of the first layer, then of the second, and so on. To be called by one thread at
        a time, in inference mode.
    """

    def run(pixel_values: Tensor) -> tuple[Tensor, ...]:
        if not projections:
            return (tower(pixel_values).last_hidden_state,)
        encoder: Any = tower.encoder
        attentions = [layer.self_attn for layer in encoder.layers]
        modules = [getattr(a, name) for a in attentions for name in ("q_proj", "k_proj")]
        captured: dict[int, Tensor] = {}

        def capture(module: object, _args: object, output: Tensor) -> None:
            captured[id(module)] = output

        handles = [module.register_forward_hook(capture) for module in modules]
        try:
            hidden = tower(pixel_values).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return (hidden, *(captured[id(module)] for module in modules))

    if example.device.type != "cpu":
        return run
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            # deprecated in favour of torch.compile, which needs a C++ compiler, and of torch.export, whose
            # module the interpreter runs
            warnings.simplefilter("ignore")
            traced: TowerPass = torch.jit.trace(run, example, check_trace=False)
    except Exception as error:
        # the text of a tracing error holds whole weights
        logger.warning(
            "vtprune: the vision tower could not be traced (%s) and runs as Python, slower under load.",
            type(error).__name__,
        )
        return run
    return traced
