# SPDX-License-Identifier: Apache-2.0
"""The code of docs/clients.md, run as a reader would run it, against a server of the tests."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.helpers.client import metric

PAGE = REPOSITORY / "docs" / "clients.md"


@dataclass(frozen=True)
class Snippet:
    """One client's section of the page.

    Attributes:
        title: its heading.
        language: `python` or `sh`.
        code: what the fence holds.
        packages: what the section says to `pip install`; empty where it comes with vLLM.
    """

    title: str
    language: str
    code: str
    packages: tuple[str, ...]


def _read() -> dict[str, Snippet]:
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        title = section.splitlines()[0]
        fence = re.search(r"^```(python|sh)\n(.*?)^```", section, re.S | re.M)
        assert fence is not None, title
        install = re.search(r"^`pip install ([^`]+)`", section, re.M)
        packages = tuple(shlex.split(install[1])) if install else ()
        found[title] = Snippet(title, fence[1], fence[2], packages)
    return found


SNIPPETS = _read()


def run(
    snippet: Snippet, server: str, folder: Path, python: str = sys.executable, seconds: float = 240
) -> str:
    """Run it; gives its output.

    Args:
        snippet: the client's.
        server: the base URL that stands in for the page's.
        folder: for what it writes, and its home.
        python: the interpreter of the environment that has the client; its scripts are found first.
        seconds: it may take.
    """
    # the page's folder first: a checkout may lie in one of that name itself
    code = snippet.code.replace("/tmp/", f"{folder}/")
    code = code.replace("http://localhost:8000", server).replace(".venv/bin/python", python)
    command = [python, "-c", code] if snippet.language == "python" else ["bash", "-ec", code]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VLLM_PLUGINS")
    }
    # not the machine's proxies, for a server on this machine
    environment = {key: value for key, value in environment.items() if not key.lower().endswith("_proxy")}
    path = f"{Path(python).parent}:{environment['PATH']}"
    # AIPerf takes a folder as its tokenizer only while it may ask the hub, which it then does not do
    environment["HF_HUB_OFFLINE"] = "1"
    if snippet.title == "AIPerf":
        del environment["HF_HUB_OFFLINE"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**environment, "PATH": path, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    return output


def balanced_requests(server: str) -> float:
    """Requests that the server has answered under the preset that the page asks for."""
    return metric(server, "vtprune_requests_total", 'preset="balanced"')
