# SPDX-License-Identifier: Apache-2.0
"""`vtprune eval` from the command line, on the embedded model and a few scenes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.checkpoints import random_llava
from vllm_vtprune import demo_model
from vtprune_eval.__main__ import main
from vtprune_eval.arguments import make_parser
from vtprune_eval.backend import RunnerError
from vtprune_eval.server_backend import RemoteRunner
from vtprune_eval.study import choose_prune_layer
from vtprune_eval.tasks import Questions, drawn_questions, file_questions
from vtprune_eval.transformers_backend import LocalModel
from vtprune_loadtest.command import CANNOT_RUN


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with four decoder layers."""
    return random_llava(tmp_path_factory.mktemp("eval") / "four", layers=4, hidden=64, heads=2, kv_heads=2)


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
        assert {"random", "uniform", "downscale", "unpruned"} == set(row["versus"])
    assert document["rows"][2]["prompt_tokens_kept"] < document["rows"][1]["prompt_tokens_kept"]
    with Image.open(tmp_path / "evaluation.png") as plot:
        assert plot.width > 400
    printed = capsys.readouterr().out
    assert all(label in printed for label in labels)


def test_drawn_questions_are_written_at_the_models_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "made" / "scenes.jsonl"
    assert main(["--scenes", "3", "--write-questions", str(path)]) == 0
    asked, drawn = file_questions(path), drawn_questions("test", 3, 168)
    assert [q.text for q in asked.asked] == [q.text for q in drawn.asked]
    assert {picture.size for picture in asked.pictures} == {(168, 168)}
    assert f"{len(asked.asked)} questions about 3 pictures" in capsys.readouterr().out
    assert main(["--write-questions", str(path), "--questions", str(path)]) == CANNOT_RUN
    assert "leave out --questions" in capsys.readouterr().err


def test_presets(tmp_path: Path) -> None:
    command = f"--scenes 2 --preset off,balanced --prune-layer 1 --no-baselines --out {tmp_path}"
    assert main(command.split()) == 0
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert len(rows) == 2  # `off` is the unpruned row
    assert set(rows[1]["versus"]) == {"unpruned"}


def test_the_demo_model_drops_at_its_own_prune_layer(tmp_path: Path) -> None:
    assert main(f"--scenes 1 --preset balanced --no-baselines --out {tmp_path}".split()) == 0
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert rows[1]["setting"]["prune_layer"] == demo_model.PRUNE_LAYER == 3


def test_schedules_are_measured(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"prune_layers": "2:0.5,4:0", "relevance": ["key_norm"]}')
    command = f"--scenes 2 --schedule aim {tmp_path}/mine.json 3:vision=0.5 --out {tmp_path}"
    assert main(command.split()) == 0
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    settings = [row["setting"] for row in rows[1:]]
    assert [s["relevance"] for s in settings] == ["pagerank,pagerank", "key_norm", "attention"]
    assert [s["schedule"] for s in settings[1:]] == ["2:0.5,4:0", "3:vision=0.5"]
    shares = [row["cache_share"] for row in rows]
    assert shares[0] == 1 and max(shares[1:]) < 1
    # two of five layers hold the picture, two half of the prompt, one the text alone
    assert shares[2] == pytest.approx((2 + 2 * 0.5 + 0.06) / 5, abs=0.01)
    assert "random" in rows[2]["versus"]


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
        ("{random} --kv-keep 0.5", "--kv-keep drops tokens at a prune layer (kv_keep 0.5): name it with"),
        ("{random} --preset off,balanced", "--prune-layer, 1 to 3 for this model's 4 decoder layers"),
        (
            "--kv-keep 0.5 --prune-layer 2,9",
            "--prune-layer must be 1 to 4 for this model's 5 decoder layers, not 9",
        ),
        ("/no/such/model --aggressiveness 0.5", "MODEL /no/such/model is neither"),
        ("--server http://127.0.0.1:9 --prune-layer 2", "--prune-layer: leave that out with --server"),
        ("--draw /no/such.png --aggressiveness 0.5", "/no/such.png"),
        ("--scenes 1 --out /dev/null/x", "--out /dev/null/x cannot be made"),
        ("--scenes 0", "--scenes: must be one whole number of at least 1, not '0'"),
        ("--method best", "--method: must be every or some of inflection"),
        ("--aggressiveness 0.2,2", "--aggressiveness: must be a number in [0, 1], not 2"),
        ("--keep-ratio 0", "--keep-ratio: must be a number in (0, 1], not 0"),
        ("--keep-ratio x", "--keep-ratio: must be a number in (0, 1], not x"),
        ("--prune-layer 0", "--prune-layer: must be whole numbers of at least 1, not '0'"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--study", "--out"),
        ("--schedule 2:0.5,5:0", "must be 1 to 4 for 5 decoder layers, not 5"),
        ("--schedule aim --prune-layer 2", "--schedule stands in place of"),
        ("--server http://127.0.0.1:9 --schedule aim", "--schedule: leave that out with --server"),
        ("--questions /nowhere.jsonl", "cannot be read"),
        ("--size 336", "--size is of drawn pictures and needs --server"),
        ("--server http://127.0.0.1:9 --size 100", "Image size 100 must be a positive multiple"),
        ("--server http://127.0.0.1:9 --scenes 1", "does not answer"),
    ],
)
def test_what_cannot_run_is_one_sentence_before_a_model_is_loaded(
    command: str,
    sentence: str,
    four_layers: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LocalModel, "__init__", lambda *_: pytest.fail("a model was loaded"))
    assert main(command.format(random=four_layers).split()) == CANNOT_RUN
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("vtprune eval: ") and error.count("\n") == 1


def test_a_server_is_shown_pictures_of_the_size_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int]] = []

    def start(_: RemoteRunner, url: str, questions: Questions, **__: object) -> None:
        shown.extend(picture.size for picture in questions.pictures)
        raise RunnerError(f"{url} was not asked.")

    monkeypatch.setattr(RemoteRunner, "__init__", start)
    assert main(["--server", "http://127.0.0.1:9", "--scenes", "2", "--size", "336"]) == CANNOT_RUN
    assert main(["--server", "http://127.0.0.1:9", "--scenes", "1"]) == CANNOT_RUN
    assert shown == [(336, 336), (336, 336), (168, 168)]


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-the-environment")
    assert make_parser("vtprune eval", None).parse_args([]).api_key == "sk-from-the-environment"


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
