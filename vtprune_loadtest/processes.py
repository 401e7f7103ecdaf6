# SPDX-License-Identifier: Apache-2.0
"""Starts a server process of its own session, waits until it answers, and stops all it started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]

from vtprune_loadtest.errors import LoadTestError

_POLL_S = 0.5
_STOP_S = 30.0
_LOG_TAIL = 4000


@dataclass(frozen=True)
class ServerProcess:
    """A server that answers `/health`.

    Attributes:
        url: its base URL.
        process: the API process.
        log: the file its output goes to.
    """

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @staticmethod
    def start(
        command: Sequence[str], log: Path, env: Mapping[str, str], *, within_s: float, cwd: Path | None = None
    ) -> ServerProcess:
        """Run a command with an address and a free port added, and wait until it is healthy.

        Raises:
            LoadTestError: it ended or did not answer in time; the end of its log is in the message.
        """
        port = _free_port()
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(env),
                cwd=cwd,
                start_new_session=True,
            )
        server = ServerProcess(f"http://127.0.0.1:{port}", process, log)
        try:
            server._wait_until_healthy(within_s)
        except BaseException:
            server.stop()
            raise
        return server

    def healthy(self) -> bool:
        """Whether `/health` answers 200."""
        return httpx.get(f"{self.url}/health", timeout=20, trust_env=False).status_code == httpx.codes.OK

    def members(self) -> list[psutil.Process]:
        """The live processes of its session: it and what it started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                own = os.getsid(process.pid) == self.process.pid
                if own and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def cpu_seconds(self) -> float:
        """User and system time of all of its live processes so far; NaN where there is none."""
        times = []
        for process in self.members():
            with contextlib.suppress(psutil.NoSuchProcess):
                used = process.cpu_times()
                times.append(used.user + used.system)
        return sum(times) if times else float("nan")

    def stop(self) -> None:
        """Ask it to end, then kill whatever is left of its process group."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _wait_until_healthy(self, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if self.healthy():
                    return
            time.sleep(_POLL_S)
        tail = self.log.read_text(errors="replace")[-_LOG_TAIL:]
        raise LoadTestError(f"The server did not start; its log {self.log} ends with:\n{tail}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
