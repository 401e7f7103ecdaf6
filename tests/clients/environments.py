# SPDX-License-Identifier: Apache-2.0
"""docs/clients.md in environments of its own: `make test-clients` (ARGS="-k litellm" runs one).

Each client is installed at the version the page names, into ~/.cache/vtprune/clients. Not collected by `make
test`: the environments take minutes to gigabytes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.models import default_model_dir
from tests.clients.snippets import SNIPPETS, Snippet, balanced_requests, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]

#: Clients of test_clients.py in their newest release, beside the one that vLLM brings.
NEWEST = {"OpenAI": "openai==3.57.0", "Anthropic": "anthropic==2.14.0"}
#: What a client needs beyond the page's `pip install`: torch for the CPU instead of gigabytes of CUDA.
BESIDE = {"GuideLLM": ("torch==2.13.0+cpu",)}
#: Those the page says were run, but for the one that comes with vLLM and has no environment of its own.
TITLES = [title for title, snippet in SNIPPETS.items() if snippet.tested and title != "vllm bench serve"]


def environment(snippet: Snippet, packages: tuple[str, ...]) -> str:
    """The interpreter of an environment that has these packages."""
    folder = default_model_dir() / "clients" / snippet.title.lower().replace(" ", "-")
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*install, *packages], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return str(python)


@pytest.mark.parametrize("title", TITLES)
def test_the_page_s_code_prunes(server: str, title: str, tmp_path: Path) -> None:
    snippet = SNIPPETS[title]
    packages = snippet.packages or (NEWEST[title],)
    python = environment(snippet, (*packages, *BESIDE.get(title, ())))
    before = balanced_requests(server)
    output = run(snippet, server, tmp_path, python, seconds=900)
    print(output[-2000:])
    assert balanced_requests(server) > before, output[-4000:]
