# SPDX-License-Identifier: Apache-2.0
"""Has vLLM look at model classes in the process that asks."""

from __future__ import annotations


def inspect_here() -> None:
    """Look at a model's class here, and not in a process that imports vLLM for it.

    `vllm.model_executor.models.registry._run_in_subprocess` keeps CUDA out of the process that asks, which
    tests on the CPU need not care about. What was seen is remembered in files of ~/.cache/vllm: without those
    the tests would start twenty such processes, of ten seconds each.
    """
    from vllm.model_executor.models import registry

    assert callable(registry._run_in_subprocess)
    registry._run_in_subprocess = lambda fn: fn()
