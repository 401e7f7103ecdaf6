# SPDX-License-Identifier: Apache-2.0
"""docs/clients.md in environments of its own: `make test-clients` (ARGS="-k litellm" runs one).

Each client is installed at the version the page names, into ~/.cache/vtprune/clients. Not collected by `make
test`: the environments take minutes to gigabytes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.models import default_model_dir
from tests.clients.snippets import SNIPPETS, Snippet, balanced_requests, run
from tests.conftest import REPOSITORY
from vtprune_eval.__main__ import main
from vtprune_eval.published import default_python
from vtprune_eval.tasks import drawn_questions

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]

#: Clients of test_clients.py in their newest release, beside the one that vLLM brings.
NEWEST = {"OpenAI": "openai==3.57.0", "Anthropic": "anthropic==2.14.0"}
#: What a client needs beyond the page's `pip install`: torch for the CPU instead of gigabytes of CUDA.
BESIDE = {"GuideLLM": ("torch==2.13.0+cpu",)}
#: Those in an environment of their own: one comes with vLLM, and one has that of `vtprune eval --tasks`.
TITLES = [title for title in SNIPPETS if title not in ("vllm bench serve", "lmms-eval")]


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


def test_lmms_eval_on_the_page_prunes(server: str, tmp_path: Path) -> None:
    """The page's line with a task of our own, since POPE's pictures lie on the hub."""
    subprocess.run([sys.executable, REPOSITORY / "tools" / "tasks_env.py"], check=True)
    local_task(tmp_path / "tasks", 4)
    snippet = SNIPPETS["lmms-eval"]
    assert "--tasks pope" in snippet.code
    # `run` puts `tmp_path` in the place of /tmp
    code = snippet.code.replace("--tasks pope", "--include_path /tmp/tasks --tasks vtprune_scenes")
    before = balanced_requests(server)
    output = run(replace(snippet, code=code), server, tmp_path, str(default_python()), seconds=900)
    print(output[-2000:])
    assert balanced_requests(server) == before + 8, output[-4000:]


def local_task(folder: Path, scenes: int) -> Path:
    """Questions about drawn scenes as a task in lmms-eval's own format."""
    shutil.copytree(REPOSITORY / "tests" / "clients" / "lmms_tasks", folder)
    asked = drawn_questions("test", scenes, 336)
    lines = []
    for number, picture in enumerate(asked.pictures):
        picture.save(folder / f"{number}.png")
    for question in asked.asked:
        image = str(folder / f"{question.picture}.png")
        lines.append(json.dumps({"image": image, "question": question.text, "answer": question.answers[0]}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    task = folder / "vtprune_scenes.yaml"
    task.write_text(task.read_text().replace("test: questions", f"test: {folder}/questions"))
    return folder


def test_published_benchmarks_through_lmms_eval(server: str, tmp_path: Path) -> None:
    """`vtprune eval --tasks` with the real lmms-eval and a local task, and again without running anything."""
    subprocess.run([sys.executable, REPOSITORY / "tools" / "tasks_env.py"], check=True)
    tasks, out = local_task(tmp_path / "tasks", 6), tmp_path / "out"
    command = [
        "--server",
        server,
        "--tasks",
        "vtprune_scenes",
        "--tasks-include",
        str(tasks),
        "--out",
        str(out),
    ]
    assert main([*command, "--preset", "balanced"]) == 0
    document = json.loads((out / "tasks.json").read_text())
    rows = {row["arm"]: row for row in document["rows"]}
    asked = len((tasks / "questions.jsonl").read_text().splitlines())
    assert set(rows) == {"off", "balanced", "balanced-random"}, "the demo model's tower takes one size"
    assert all(row["traffic"]["answered"] == asked for row in rows.values())
    assert rows["off"]["share_kept"] == 1.0 > rows["balanced"]["share_kept"]
    assert rows["balanced"]["share_kept"] == rows["balanced-random"]["share_kept"]
    assert rows["off"]["metrics"]["right"]["value"] >= 0.9
    assert (out / "tasks.png").is_file() and "vtprune_scenes" in (out / "tasks.md").read_text()
    before = balanced_requests(server)
    assert main([*command, "--preset", "balanced"]) == 0
    assert balanced_requests(server) == before
