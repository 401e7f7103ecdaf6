# SPDX-License-Identifier: Apache-2.0
"""Runs a module that starts an engine in a process of its own, and reads what it saved."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.conftest import python_path
from tests.helpers.warm_process import READ_AT_IMPORT, WarmProcess

_ENVIRONMENT = {
    # so small a model gains nothing from threads, which spin where cores are shared
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # where vLLM compiles, it does so with torch's eager backend: traced like any other, without inductor
    "VLLM_CPU_CI_ENV": "1",
}
#: Those that wait for an order, by what they were started with.
_WARM: dict[tuple[str | None, ...], list[WarmProcess]] = {}


def saved_by(
    module: str, *arguments: str, out: Path, env: Mapping[str, str] | None = None, timeout: float = 850
) -> dict[str, Any]:
    """Run ``python -m MODULE ARGUMENTS``, which `torch.save`s to `out`, and load that.

    The process is forked from one that has imported vLLM (`tests.helpers.warm_process`).

    Args:
        module: the module's name.
        arguments: its arguments, `out` among them.
        out: the file that it writes.
        env: variables beside those that all of them are given.
        timeout: seconds until it is killed.

    Raises:
        AssertionError: it failed; the end of what it printed is in the message.
        TimeoutError: it was killed.
    """
    environment = {**os.environ, "PYTHONPATH": python_path(), **_ENVIRONMENT, **(env or {})}
    log = out.with_suffix(".log")
    idle = _WARM.setdefault(tuple(environment.get(name) for name in READ_AT_IMPORT), [])
    process = idle.pop() if idle else _started(environment)
    status = process.run(module, arguments, env=environment, log=log, timeout=timeout)
    idle.append(process)
    assert status == 0, log.read_text(errors="replace")[-4000:]
    found: dict[str, Any] = torch.load(out, weights_only=False)
    return found


def _started(environment: Mapping[str, str]) -> WarmProcess:
    process = WarmProcess(environment)
    atexit.register(process.close)
    return process
