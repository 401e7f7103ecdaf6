# SPDX-License-Identifier: Apache-2.0
"""`vtprune eval --tasks` with a stand-in for lmms-eval that asks and writes as it does.

The real one runs in `make test-clients`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.fake_chat import FakeChat, serve_fake_chat
from tests.helpers.loadtest_runs import pictures
from vtprune_eval.__main__ import main

#: Asks three questions and scores how many were answered; the files and keys are lmms-eval's.
STAND_IN = """
import base64, io, json, pathlib, sys, urllib.request
from PIL import Image
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
log = sys.argv.index("--log_samples")
options |= dict(zip(sys.argv[log + 1::2], sys.argv[log + 2::2]))
arguments = dict(part.split("=", 1) for part in options["--model_args"].split(","))
answered = 0
for number in range(int(options.get("--limit", 3))):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (number, 0, 0)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what ?"}]
    body = {"model": arguments["model_version"], "messages": [{"role": "user", "content": content}]}
    where, kind = arguments["base_url"] + "/chat/completions", {"Content-Type": "application/json"}
    request = urllib.request.Request(where, json.dumps(body).encode(), kind)
    try:
        answered += urllib.request.urlopen(request).status == 200
    except OSError:
        pass
task = options["--tasks"]
if task == "broken":
    sys.exit("no such task: broken")
folder = pathlib.Path(options["--output_path"]) / "model"
folder.mkdir(parents=True, exist_ok=True)
entry = {"alias": task, "right,none": answered / 3, "right_stderr,none": 0.1, "text,none": "x"}
entry |= {"right_stderr_clt,none": 0.2, "right_expected_accuracy,none": []}
(folder / "20261127_results.json").write_text(json.dumps({"results": {task: entry}}))
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter of an environment with that."""
    package = tmp_path / "environment" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    script = tmp_path / "environment" / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def fake() -> Iterator[FakeChat]:
    with serve_fake_chat() as chat:
        yield chat


def run(fake: FakeChat, python: Path, out: Path, *more: str) -> int:
    where = ["--server", fake.url, "--tasks-python", str(python), "--out", str(out)]
    return main([*where, *more])


def sent(fake: FakeChat) -> list[tuple[str | None, str | None]]:
    return [(h.get("x-vtprune-preset"), h.get("x-vtprune-method")) for h in fake.headers]


def test_off_presets_random_and_downscale_stand_side_by_side(
    fake: FakeChat, python: Path, tmp_path: Path
) -> None:
    assert run(fake, python, tmp_path / "out", "--tasks", "pope,gqa", "--preset", "light,balanced") == 0
    document = json.loads((tmp_path / "out" / "tasks.json").read_text())
    arms = ["off"]
    for name in ("light", "balanced"):
        arms += [name, f"{name}-random", f"{name}-downscale"]
    assert [(row["task"], row["arm"]) for row in document["rows"]] == [
        (task, arm) for task in ("pope", "gqa") for arm in arms
    ]
    asked = {
        "off": ("off", None), "light": ("light", None), "light-random": ("light", "random"),
        "light-downscale": ("off", None), "balanced": ("balanced", None),
        "balanced-random": ("balanced", "random"), "balanced-downscale": ("off", None),
    }  # fmt: skip
    assert sent(fake) == [asked[arm] for _ in ("pope", "gqa") for arm in arms for _ in range(3)]
    sizes = [Image.open(io.BytesIO(data)).size for body in fake.bodies for data in pictures(body)]
    by_arm = dict(zip(arms, [sizes[3 * i] for i in range(len(arms))], strict=True))
    # as many pixels as the arm before kept of its tokens: 50 and 22 %
    assert by_arm == {
        **dict.fromkeys(arms, (40, 40)), "light-downscale": (28, 28), "balanced-downscale": (19, 19)
    }  # fmt: skip
    kept = {row["arm"]: row["share_kept"] for row in document["rows"][: len(arms)]}
    assert (kept["off"], kept["light"], kept["balanced-random"]) == (1.0, 0.5, 0.22)
    assert document["rows"][0]["metrics"] == {"right": {"value": 1.0, "error": 0.1}}
    page = (tmp_path / "out" / "tasks.md").read_text()
    assert "## pope" in page and "| balanced-random" in page and "100.0 %" in page
    with Image.open(tmp_path / "out" / "tasks.png") as plot:
        assert plot.width > 800


def test_what_is_done_is_not_run_again_and_what_was_asked_for_otherwise_is(
    fake: FakeChat, python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(fake, python, out, "--tasks", "pope,broken", "--limit", "2") == 2
    error = capsys.readouterr().err
    assert "lmms-eval failed on broken" in error and "no such task" in error
    before = len(fake.bodies)
    assert run(fake, python, out, "--tasks", "pope", "--limit", "2") == 0
    assert len(fake.bodies) == before and "done before" in capsys.readouterr().out
    assert run(fake, python, out, "--tasks", "pope", "--limit", "1") == 0
    assert len(fake.bodies) == before + 4


def test_a_refused_request_is_told(fake: FakeChat, python: Path, tmp_path: Path) -> None:
    fake.fail = lambda number: 500 if number == 1 else None
    assert run(fake, python, tmp_path / "out", "--tasks", "pope") == 0
    document = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert document["rows"][0]["metrics"]["right"]["value"] == pytest.approx(2 / 3)
    (note,) = document["notes"]
    assert "off, pope: 1 requests were refused" in note and "refused with 500" in note


def test_a_tower_of_one_size_has_no_downscale_arm(fake: FakeChat, python: Path, tmp_path: Path) -> None:
    fake.tokens_per_image = 144
    assert run(fake, python, tmp_path / "out", "--tasks", "pope") == 0
    document = json.loads((tmp_path / "out" / "tasks.json").read_text())
    assert [row["arm"] for row in document["rows"]] == ["off", "balanced", "balanced-random"]
    assert "one size" in document["notes"][0]


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--tasks", "pope"], "--tasks needs --out"),
        (["--tasks", "pope", "--out", "{out}", "--method", "scope"], "leave out --method"),
        (["--tasks", "pope", "--out", "{out}", "--tasks-python", "/nowhere/python"], "has no lmms-eval"),
        (["--tasks", "pope", "--out", "{out}", "--tasks-python", sys.executable], "make tasks-env"),
        (["/nowhere", "--tasks", "pope", "--out", "{out}"], "neither a folder"),
    ],
)
def test_what_cannot_run_is_refused_first(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([part.replace("{out}", str(tmp_path)) for part in arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_server_that_is_not_vtprunes_is_refused(
    fake: FakeChat, python: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.hides_config = True
    assert run(fake, python, tmp_path / "out", "--tasks", "pope") == 2
    assert "vtprune serve" in capsys.readouterr().err and not fake.bodies
