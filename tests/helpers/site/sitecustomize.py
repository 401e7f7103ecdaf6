# SPDX-License-Identifier: Apache-2.0
"""Has vLLM's processes sleep while they wait for each other: those that have this folder in PYTHONPATH.

A worker, and the engine that waits for its answer, read a queue in shared memory in a loop, and sleep only
when nothing has come for a second (`vllm.distributed.device_communicators.shm_broadcast.SpinCondition`).
Where an engine has cores of its own that saves microseconds a step. Here several engines, the vision tower
and the tests share two: an engine with a request a second would take both. Python imports this at its start.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_QUEUES = "vllm.distributed.device_communicators.shm_broadcast"


class _Loader(SourceFileLoader):
    """Loads it and has its readers sleep at once."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        (seconds,) = module.SpinCondition.__init__.__defaults__
        assert seconds == 1
        module.SpinCondition.__init__.__defaults__ = (0,)


class _Finder:
    """Finds that module alone."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _QUEUES else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder)
