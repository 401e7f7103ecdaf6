# SPDX-License-Identifier: Apache-2.0
"""Runs a scenario of `tests.helpers.kv_run` in a process of its own, since a plugin cannot be unloaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.conftest import REPOSITORY


def run_scenario(name: str, checkpoint: Path, out: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What the scenario saw.

    Args:
        name: of the scenario.
        checkpoint: what it loads.
        out: the file it saves to.
        environment: variables beside those that every scenario has.
    """
    process = subprocess.run(
        [sys.executable, "-m", "tests.helpers.kv_run", name, str(checkpoint), str(out)],
        # the flag makes vLLM compile with torch's eager backend: traced like any other, without inductor
        env={
            **os.environ,
            "VLLM_PLUGINS": "vtprune",
            "VLLM_CPU_CI_ENV": "1",
            # so small a model gains nothing from threads, which spin where cores are shared
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
            **environment,
        },
        cwd=REPOSITORY,
        capture_output=True,
        timeout=850,
    )
    assert process.returncode == 0, process.stderr.decode(errors="replace")[-4000:]
    result: dict[str, Any] = torch.load(out, weights_only=False)
    return result
