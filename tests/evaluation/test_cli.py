# SPDX-License-Identifier: Apache-2.0
"""`vtprune eval` from the command line, on the embedded model and a few scenes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vtprune_eval.__main__ import CANNOT_RUN, main
from vtprune_eval.study import choose_prune_layer
from vtprune_eval.tasks import drawn_questions


def test_a_grid_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        f"--scenes 4 --method topk,divprune --keep-ratio 0.5 --kv-keep 1,0.5 --prune-layer 2 --out {tmp_path}"
    )
    assert main(command.split()) == 0
    document = json.loads((tmp_path / "evaluation.json").read_text())
    labels = [row["label"] for row in document["rows"]]
    assert labels == [
        "unpruned",
        "topk keep_ratio=0.5",
        "topk keep_ratio=0.5 kv_keep=0.5 scope=all K=2 window=8 attention",
        "divprune keep_ratio=0.5",
        "divprune keep_ratio=0.5 kv_keep=0.5 scope=all K=2 window=8 attention",
    ]
    for row in document["rows"][1:]:
        assert row["vision_tokens_kept"] == 72
        assert {"random", "uniform", "unpruned"} == set(row["versus"])
    assert document["rows"][2]["prompt_tokens_kept"] < document["rows"][1]["prompt_tokens_kept"]
    with Image.open(tmp_path / "evaluation.png") as plot:
        assert plot.width > 400
    printed = capsys.readouterr().out
    assert all(label in printed for label in labels)


def test_presets(tmp_path: Path) -> None:
    command = f"--scenes 2 --preset off,balanced --prune-layer 1 --no-baselines --out {tmp_path}"
    assert main(command.split()) == 0
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert len(rows) == 2  # `off` is the unpruned row
    assert set(rows[1]["versus"]) == {"unpruned"}


def test_a_picture_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn_questions("test", 1, 168).pictures[0].resize((300, 200)).save(tmp_path / "wide.png")
    assert (
        main(["--draw", str(tmp_path / "wide.png"), "--aggressiveness", "0.5", "--out", str(tmp_path)]) == 0
    )
    path = tmp_path / "wide-inflection_aggressiveness0.5.png"
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as plot:
        assert plot.width > plot.height > 200


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("--aggressiveness 0.5 --keep-ratio 0.5", "exclude"),
        ("--kv-keep 0.5 --scenes 1", "--prune-layer"),
        ("--study", "--out"),
        ("--questions /nowhere.jsonl", "cannot be read"),
        ("--server http://127.0.0.1:9 --scenes 1", "does not list a model"),
    ],
)
def test_what_cannot_run_is_one_sentence(
    command: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command.split()) == CANNOT_RUN
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("vtprune eval: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "command", ["--method best", "--aggressiveness 2", "--keep-ratio 0", "--keep-ratio x", "--prune-layer 0"]
)
def test_bad_values_are_refused_by_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(command.split())
    assert command.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "means,chosen",
    [
        ({1: [0.9, 0.2], 2: [0.8, 1.0], 3: [0.95, 0.95]}, 3),
        ({1: [0.9, 0.2], 2: [0.95, 0.94], 3: [0.96, 0.96]}, 2),  # nearly as good, and frees more
        ({3: [0.9], 1: [0.9], 2: [0.5]}, 1),
    ],
)
def test_the_smallest_prune_layer_as_good_as_the_best_is_chosen(
    means: dict[int, list[float]], chosen: int
) -> None:
    rows: list[dict[str, object]] = [{"setting": {"prune_layer": None}, "accuracy": {"value": 1.0}}]
    for layer, values in means.items():
        rows += [{"setting": {"prune_layer": layer}, "accuracy": {"value": value}} for value in values]
    assert choose_prune_layer(rows) == chosen
