# SPDX-License-Identifier: Apache-2.0
"""Requests that a worker could not serve, on their way to the scheduler.

They travel as an attribute of `vllm.v1.outputs.ModelRunnerOutput`, which is pickled whole between processes.
`vllm.v1.worker.gpu.async_utils.AsyncOutput` (Model Runner V2) and
`vllm.v1.worker.gpu_model_runner.AsyncGPUModelRunnerOutput` (V1) hold one and return it later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
    attach(output, _ATTRIBUTE, dict.fromkeys(state.take_overrun(), True))


def attach(output: Any, name: str, by_row: Mapping[int, Any]) -> None:
    """Give what travels to the scheduler an attribute that holds the values by request id.

    Args:
        output: what the model runner's `sample_tokens` returned for the step; None after a failed one.
        name: of the attribute; it is left out where there is nothing to hold.
        by_row: by row of the batch.
    """
    if not by_row or output is None:
        return
    if not isinstance(output, ModelRunnerOutput):
        output = getattr(output, "model_runner_output", None) or output._model_runner_output
    setattr(output, name, {output.req_ids[row]: value for row, value in by_row.items()})


def failed_requests(output: ModelRunnerOutput) -> Collection[str]:
    """Ids that `report_failures` noted."""
    ids: Collection[str] = getattr(output, _ATTRIBUTE, ())
    return ids
