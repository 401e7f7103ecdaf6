# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus (Debian's package) for tests."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

MISSING = "" if shutil.which("prometheus") else "prometheus is not installed: apt-get install prometheus"


class Prometheus:
    """One that runs, by its URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def samples(self, expression: str) -> list[Any]:
        """What an expression gives: a `metric` and a `value` each.

        Raises:
            httpx.HTTPError: it is still starting, which it says with a 503 in plain text.
        """
        response = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=20)
        answer = response.raise_for_status().json()
        assert answer["status"] == "success", answer
        samples: list[Any] = answer["data"]["result"]
        return samples

    def query(self, expression: str) -> float | None:
        """The value of an expression that gives one sample; None without any."""
        samples = self.samples(expression)
        return float(samples[0]["value"][1]) if samples else None


@contextmanager
def prometheus(config: Mapping[str, Any], folder: Path) -> Iterator[Prometheus]:
    """Run it with a configuration, on loopback."""
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(dict(config)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)
