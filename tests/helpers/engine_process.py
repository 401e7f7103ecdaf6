# SPDX-License-Identifier: Apache-2.0
"""Runs a module that starts an engine in a process of its own, and reads what it saved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.conftest import REPOSITORY

_ENVIRONMENT = {
    # so small a model gains nothing from threads, which spin where cores are shared
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # where vLLM compiles, it does so with torch's eager backend: traced like any other, without inductor
    "VLLM_CPU_CI_ENV": "1",
}


def saved_by(
    module: str, *arguments: str, out: Path, env: Mapping[str, str] | None = None, timeout: float = 850
) -> dict[str, Any]:
    """Run ``python -m MODULE ARGUMENTS``, which `torch.save`s to `out`, and load that.

    Args:
        module: the module's name.
        arguments: its arguments, `out` among them.
        out: the file that it writes.
        env: variables beside those that all of them are given.
        timeout: seconds until it is killed.

    Raises:
        AssertionError: it failed; the end of its standard error is in the message.
    """
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **_ENVIRONMENT, **(env or {})},
        cwd=REPOSITORY,
        capture_output=True,
        timeout=timeout,
    )
    assert process.returncode == 0, process.stderr.decode(errors="replace")[-4000:]
    found: dict[str, Any] = torch.load(out, weights_only=False)
    return found
