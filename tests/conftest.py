# SPDX-License-Identifier: Apache-2.0
"""Environment of all tests, and the one live server they share."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# before any test module imports vLLM or transformers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import httpx
import pytest

from vllm_vtprune import demo_model
from vllm_vtprune.error_text import withhold_everywhere

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO_MODEL = demo_model.FOLDER
MODEL_NAME = "vtprune-demo"
_START_SECONDS = 240
#: Servers start from this: an engine configuration made in the test process changes variables of its own.
_ENVIRONMENT = dict(os.environ)


@dataclass(frozen=True)
class LiveServer:
    """A server process.

    Attributes:
        url: its base URL.
        process: the API process; None where it is not ours.
        log: the file its output goes to.
    """

    url: str
    process: subprocess.Popen[bytes] | None
    log: Path

    def healthy(self) -> bool:
        """Whether `/health` answers 200."""
        return httpx.get(f"{self.url}/health", timeout=20).status_code == 200


def start_server(
    log: Path, *arguments: str, module: str = "vtprune_server.cli", env: dict[str, str] | None = None
) -> LiveServer:
    """Start ``python -m vtprune_server.cli serve ARGUMENTS`` and wait until it is healthy."""
    port = _free_port()
    command = [sys.executable, "-m", module, *(["serve"] if module.endswith("cli") else []), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**_ENVIRONMENT, **(env or {})},
            start_new_session=True,
        )
    server = LiveServer(f"http://127.0.0.1:{port}", process, log)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if server.healthy():
                return server
        except httpx.TransportError:
            time.sleep(0.5)
    stop_server(server)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def stop_server(server: LiveServer) -> None:
    """Stop the process and whatever it started."""
    assert server.process is not None
    server.process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """The server of `vtprune serve` without arguments: the embedded model, real engine, real HTTP.

    VTPRUNE_TEST_URL names one that runs already: the same model behind something else than `vtprune serve`.
    """
    if url := os.environ.get("VTPRUNE_TEST_URL"):
        yield LiveServer(url, None, Path(os.devnull))
        return
    server = start_server(tmp_path_factory.mktemp("server") / "server.log")
    yield server
    stop_server(server)


@pytest.fixture(scope="session")
def server(live_server: LiveServer) -> str:
    """The live server's base URL."""
    return live_server.url


@pytest.fixture
def withheld() -> Iterator[None]:
    """Records are made without the text of errors, as in a process that serves requests."""
    factory = logging.getLogRecordFactory()
    withhold_everywhere()
    yield
    logging.setLogRecordFactory(factory)
