# SPDX-License-Identifier: Apache-2.0
"""Has vLLM's processes sleep while they wait for each other: those that have this folder in PYTHONPATH.

A worker, and the engine that waits for its answer, read a queue in shared memory in a loop, and wait for a
message only when nothing has come for a second (`SpinCondition`). In the loop they yield the core and have it
back at once, and whatever shares the cores with them waits: 40 requests in ten seconds cost an engine ten
seconds of a core, of which it needs less than two. Python imports this module when it starts.
"""

import os
import sys
import time
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_BETWEEN_S = 0.0005
_QUEUES = "vllm.distributed.device_communicators.shm_broadcast"


class _Loader(SourceFileLoader):
    """Loads it and has its readers sleep between two looks."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        assert callable(module.sched_yield)
        module.sched_yield = lambda: time.sleep(_BETWEEN_S)


class _Finder:
    """Finds that module alone."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _QUEUES else None
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, _Finder)

if "VTPRUNE_TEST_WARM" in os.environ:
    from warm_start import run_warm

    run_warm()
