# SPDX-License-Identifier: Apache-2.0
"""The gate's decisions on their way from worker to scheduler, and the blocks it then returned on theirs back.

The decisions are an attribute of `vllm.v1.outputs.ModelRunnerOutput`, as failures are; the blocks that a
request still holds are one of `vllm.v1.core.sched.output.SchedulerOutput` of the next step. Both are pickled
whole between processes. Between the two a worker's block-table row has more blocks than the request, as many
as were taken for a prompt that keeps its visual tokens; it writes to none of them. What it appends to the
row from the next step on must follow those that are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_vtprune.kv_drop.hooks.failures import attach

if TYPE_CHECKING:
    from vllm_vtprune.kv_drop.bands import KVDropBands

_DECISIONS, _HELD = "kv_drop_decisions", "kv_drop_held"


def report_decisions(output: Any, state: KVDropBands) -> None:
    """Note in a step's output what the gate decided in it.

    Args:
        output: what the model runner's `sample_tokens` returned for the step; None after a failed one.
        state: the present step; told once.
    """
    attach(output, _DECISIONS, state.take_decisions())


def decisions(output: ModelRunnerOutput) -> Mapping[str, bool]:
    """By request, whether its visual tokens leave: what `report_decisions` noted."""
    found: Mapping[str, bool] = getattr(output, _DECISIONS, {})
    return found


def tell_held(output: SchedulerOutput, held: Mapping[str, list[int]]) -> None:
    """Tell the worker how many blocks of each KV-cache group a request holds, before the step's own.

    Args:
        output: the step's.
        held: by request, of those alone that returned some since the last step.
    """
    if held:
        setattr(output, _HELD, dict(held))


def told_held(output: SchedulerOutput) -> Mapping[str, list[int]]:
    """What `tell_held` told."""
    found: Mapping[str, list[int]] = getattr(output, _HELD, {})
    return found
