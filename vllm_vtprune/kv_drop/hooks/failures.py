# SPDX-License-Identifier: Apache-2.0
"""Requests that a worker could not serve, on their way to the scheduler.

They travel as an attribute of `vllm.v1.outputs.ModelRunnerOutput`, which is pickled whole between processes.
`vllm.v1.worker.gpu.async_utils.AsyncOutput` (Model Runner V2) and
`vllm.v1.worker.gpu_model_runner.AsyncGPUModelRunnerOutput` (V1) hold one and return it later.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from vllm.v1.outputs import ModelRunnerOutput

if TYPE_CHECKING:
    from vllm_vtprune.kv_drop.bands import KVDropBands

_ATTRIBUTE = "kv_drop_failed"


def report_failures(output: Any, state: KVDropBands) -> None:
    """Note in a step's output which of its requests held too few blocks.

    Args:
        output: what the model runner's `sample_tokens` returned for the step; None after a failed one.
        state: the present step; told once.
    """
    overrun = state.take_overrun()
    if not overrun or output is None:
        return
    output = held_by(output)
    setattr(output, _ATTRIBUTE, [output.req_ids[row] for row in overrun])


def held_by(output: Any) -> ModelRunnerOutput:
    """The output that travels to the scheduler, of what `sample_tokens` returned."""
    if isinstance(output, ModelRunnerOutput):
        return output
    held: ModelRunnerOutput = getattr(output, "model_runner_output", None) or output._model_runner_output
    return held


def failed_requests(output: ModelRunnerOutput) -> Collection[str]:
    """Ids that `report_failures` noted."""
    ids: Collection[str] = getattr(output, _ATTRIBUTE, ())
    return ids
