# SPDX-License-Identifier: Apache-2.0
"""`vtprune calibrate` end to end on the embedded model, and its schedule on the real engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from tests.conftest import DEMO_MODEL, start_server, stop_server
from tests.helpers.kv_gate import halving_gate
from vllm_vtprune.fingerprint import fingerprint
from vllm_vtprune.kv_drop.gate import GateFacts, read_facts, save
from vllm_vtprune.kv_drop.schedule import PruneLayer, check, resolve
from vllm_vtprune.policy import PrunePolicy
from vllm_vtprune.settings import KVSettings
from vtprune_calibrate.__main__ import main
from vtprune_calibrate.gate import fires
from vtprune_calibrate.run import held_out
from vtprune_calibrate.search import SearchError
from vtprune_eval.server_backend import RemoteRunner
from vtprune_eval.setting import AS_SCHEDULED, Setting
from vtprune_eval.study import SHARES
from vtprune_eval.tasks import Question, Questions, drawn_questions, file_questions
from vtprune_eval.transformers_backend import LocalModel, LocalRunner
from vtprune_loadtest.command import CANNOT_RUN

SCENES = 4
COMMAND = f"--budget kv=0.6 --bands 2 --scenes {SCENES} --relevance attention,inherited"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a calibration under a budget."""
    folder = tmp_path_factory.mktemp("calibrated")
    command = f"{COMMAND} --out {folder}"
    assert main(command.split()) == 0
    return folder


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "schedule.json").read_text())
    return found


def test_the_schedule_keeps_the_budget_and_says_where_it_comes_from(calibrated: Path) -> None:
    found = read(calibrated)
    schedule = resolve(str(calibrated / "schedule.json"), found["layers"])
    check(schedule.prune_layers)
    assert len(schedule.prune_layers) <= 2
    assert 0.5 < found["cost"]["kv_bytes"] <= 0.6
    assert found["model"] == {"name": DEMO_MODEL.name, "weights": fingerprint(str(DEMO_MODEL))}
    asked = [len(drawn_questions(split, SCENES, 168).asked) for split in ("validation", "test")]
    assert [found["data"]["questions"], found["data"]["held_out"]] == asked
    for part in ("searched", "held_out"):
        score = found["scores"][part]["calibrated"]
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    assert set(found["presets"]) == {"light", "balanced", "aggressive"}
    assert len(found["kendall_tau"]) == found["layers"] - 1
    with Image.open(calibrated / "schedule.png") as plot:
        assert plot.width > 800


def test_a_second_run_asks_nothing_again(
    calibrated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (calibrated / "journal.jsonl").read_text()
    monkeypatch.setattr(LocalRunner, "answer", lambda *_: pytest.fail("a question was asked again"))
    command = f"{COMMAND} --out {calibrated}"
    assert main(command.split()) == 0
    assert (calibrated / "journal.jsonl").read_text() == before
    assert f"{len(before.splitlines()) - 1} trials are in the journal" in capsys.readouterr().out
    assert main([*command.split(), "--window", "4"]) == CANNOT_RUN
    assert "another window" in capsys.readouterr().err


def test_a_tolerance_is_kept_on_the_questions_that_decide(tmp_path: Path) -> None:
    assert main(f"--tolerance 0.1 --scenes {SCENES} --out {tmp_path}".split()) == 0
    scores = read(tmp_path)["scores"]["searched"]
    assert scores["calibrated"]["value"] >= scores["unpruned"]["value"] - 0.1


def test_a_file_of_questions_is_cut_by_picture(tmp_path: Path) -> None:
    drawn = drawn_questions("train", 5, 168)
    lines = []
    for question in drawn.asked:
        drawn.pictures[question.picture].save(tmp_path / f"{question.picture}.png")
        lines.append(
            {"image": f"{question.picture}.png", "question": question.text, "answer": question.answers}
        )
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    questions = file_questions(tmp_path / "mine.jsonl")
    parts = held_out(questions, 0.4)
    assert (len(parts.search.pictures), len(parts.confirm.pictures)) == (3, 2)

    def told(part: Questions) -> set[tuple[bytes, str]]:
        return {(part.pictures[question.picture].tobytes(), question.text) for question in part.asked}

    assert told(parts.search) | told(parts.confirm) == told(questions)
    assert not told(parts.search) & told(parts.confirm)
    command = f"--questions {tmp_path}/mine.jsonl --by agreement --budget flops=0.8 --out {tmp_path}/out"
    assert main(command.split()) == 0
    found = read(tmp_path / "out")
    assert found["judged_by"] == "agreement" and found["scores"]["held_out"]["unpruned"]["value"] == 1


def test_presets_alone_are_found_on_a_folder_of_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = drawn_questions("validation", 5, 168)
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(drawn.pictures):
        picture.save(tmp_path / "pictures" / f"{number}.png")
    assert main(f"--presets --images {tmp_path}/pictures --out {tmp_path}/out".split()) == 0
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "presets.json").read_text())
    flag, _, value = next(line for line in told.splitlines() if line.startswith("--")).partition(" ")
    policy = PrunePolicy(preset_aggressiveness=value)
    assert flag == "--vtprune-preset-aggressiveness"
    assert {name: policy.presets[name].aggressiveness for name in SHARES} == found["presets"]
    for name, share in SHARES.items():
        kept = found["shares_kept"][f"{found['presets'][name]:g}"]
        assert all(abs(kept - share) <= abs(other - share) for other in found["shares_kept"].values())
    assert (tmp_path / "out" / "presets.png").stat().st_size > 10_000
    assert main(f"--presets --scenes 5 --out {tmp_path}/drawn".split()) == 0
    assert json.loads((tmp_path / "drawn" / "presets.json").read_text())["presets"] == found["presets"]


def test_the_study_compares_schedules_and_leaves_no_journal(tmp_path: Path) -> None:
    assert main(f"--study --scenes 2 --out {tmp_path}".split()) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "costs.png"}
    found = json.loads((tmp_path / "results.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names[3:6] == ["aim", "pyramid", "exit"] and len(names) == 10
    for row in found["rows"]:
        assert 0 < row["flops"] < 1 and 0 < row["kv_bytes"] < 1
        assert ("random" in row["versus"]) == (row["relevance"] is not None)
    budgets = [row["flops"] for row in found["rows"] if "flops=" in row["name"]]
    assert all(spent <= most for spent, most in zip(budgets, (0.801, 0.701, 0.601), strict=True))
    assert [row["layer"] for row in found["gates"]] == [1, 2, 3, 4]
    assert all(0 <= row["fires"] <= 1 and 0 < row["kv_bytes"] <= 1 for row in found["gates"])
    page = (tmp_path / "results.md").read_text()
    assert all(f"| {name} " in page for name in names)


def test_gates_are_trained_judged_and_written_for_this_model(tmp_path: Path) -> None:
    assert main(f"--gate 2,4 --scenes 2 --out {tmp_path}".split()) == 0
    written = json.loads((tmp_path / "gates.json").read_text())
    assert written["model"]["weights"] == fingerprint(str(DEMO_MODEL))
    for row, layer in zip(written["gates"], (2, 4), strict=True):
        facts = read_facts(tmp_path / f"exit-{layer}.gate")
        assert (facts.layer, facts.layers, facts.weights) == (layer, 5, written["model"]["weights"])
        assert row["layer"] == layer and 0 <= row["fires"] <= 1
        assert {"unpruned", "always", "chance"} <= set(row["versus"])


def test_one_picture_cannot_be_cut() -> None:
    one = Questions("one", [Image.new("RGB", (8, 8))], [Question(0, "any", "What?", ("x",))])
    with pytest.raises(SearchError, match="one has 1 picture: that leaves none"):
        held_out(one, 0.5)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("--out {out}", "Give one of --tolerance and --budget"),
        ("--tolerance 0.1 --budget kv=0.5 --out {out}", "Give one of --tolerance and --budget"),
        ("--tolerance 1 --out {out}", "--tolerance: must be a number in [0, 1), not '1'"),
        ("--budget 0.5 --out {out}", "--budget: must be flops= or kv= and a share"),
        ("--tolerance 0.1", "required: --out"),
        ("--presets --tolerance 0.1 --out {out}", "--presets finds no schedule"),
        ("--presets --images {out}/none --out {out}", "is not a folder"),
        ("--presets --images {out} --out {out}", "holds no picture"),
        ("--tolerance 0.1 --images {out} --out {out}", "which --presets takes"),
        ("m --presets --server http://127.0.0.1:9 --out {out}", "leave out yours"),
        ("--presets --scenes 1 --server http://127.0.0.1:9 --out {out}", "names no model"),
        ("--study --budget kv=0.5 --out {out}", "--study is the demo model's"),
        ("--study --gate 3 --out {out}", "--study is the demo model's"),
        ("--gate 3 --budget kv=0.5 --out {out}", "--gate trains on a checkpoint, and has no goal"),
        ("--gate 5 --scenes 1 --out {out}", "--gate must be 1 to 4 for 5 decoder layers"),
        ("--tolerance 0.1 --bands 5 --out {out}", "--bands: must be 1 to 4, not '5'"),
        ("--tolerance 0.1 --relevance inherited --out {out}", "of which the first cannot inherit"),
        (
            "--tolerance 0.1 --scenes 1 --candidates 2,5 --out {out}",
            "--candidates must be 1 to 4 for 5",
        ),
        ("--tolerance 0.1 --questions /nowhere.jsonl --out {out}", "cannot be read"),
        ("/no/such/model --tolerance 0.1 --out {out}", "MODEL /no/such/model is neither"),
    ],
)
def test_what_cannot_run_is_one_sentence_before_a_model_is_loaded(
    command: str,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LocalModel, "__init__", lambda *_: pytest.fail("a model was loaded"))
    assert main(command.format(out=tmp_path).split()) == CANNOT_RUN
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("vtprune calibrate: ") and error.count("\n") == 1


def test_a_server_without_free_prune_layers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = dict.fromkeys(
        ("hidden", "intermediate", "layers", "q_width", "kv_width", "vocab", "element"), 8
    )
    model: dict[str, Any] = {"id": "m", "weights": "w", "decoder": decoder, "prune_layers": []}

    def config(*_: object, **__: object) -> httpx.Response:
        told = {"model": model, "policy": {"window": 8, "relevance": "attention"}}
        return httpx.Response(200, json=told, request=httpx.Request("GET", "http://x"))

    monkeypatch.setattr(httpx, "get", config)
    command = f"--server http://127.0.0.1:9 --tolerance 0.1 --scenes 1 --out {tmp_path}".split()
    for prune_layers in ([], [{"layer": 2, "share": 0.5, "of": "vision"}]):
        model["prune_layers"] = prune_layers
        assert main(command) == CANNOT_RUN
        assert "--prune-layers 8:vision=1,16:vision=1" in capsys.readouterr().err
    assert main([*command, "--window", "4"]) == CANNOT_RUN
    assert "leave out yours" in capsys.readouterr().err


@pytest.mark.engine
def test_a_server_is_calibrated_as_its_checkpoint_is(tmp_path: Path) -> None:
    """The same questions, tried over HTTP on the engine's own prune layers; a gate there is left out of it.

    Asked afterwards, the gate decides as it does on transformers, and usage and metrics say so.
    """
    goal, questions = "--tolerance 0.1 --scenes 2 --candidates 1,3", drawn_questions("test", 2, 168)
    assert main(f"{goal} --out {tmp_path}/local".split()) == 0
    every = ",".join(f"{layer}:vision=1" for layer in range(1, 5))
    runner = LocalRunner(LocalModel(str(DEMO_MODEL)), questions, frozenset())
    states = runner.text_states([3])[0]
    gate, facts = halving_gate(states), GateFacts(3, 5, states.shape[1] // 2, fingerprint(str(DEMO_MODEL)))
    save(tmp_path / "exit.gate", gate, facts, {}, torch.float32)
    asked = Setting(kv=KVSettings.of((0.999,), "vision"))
    flags = ("--prune-layers", every, "--prune-gate", str(tmp_path / "exit.gate"))
    server = start_server(tmp_path / "log", *flags)
    try:
        assert main(f"{goal} --server {server.url} --out {tmp_path}/server".split()) == 0
        assert main(f"--presets --scenes 2 --server {server.url} --out {tmp_path}/presets".split()) == 0
        replies = RemoteRunner(server.url, questions).answer(asked)
        refused = RemoteRunner(server.url, questions).answer(replace(asked, kv=replace(asked.kv, gate=False)))
        metrics = httpx.get(f"{server.url}/metrics").text
        config = httpx.get(f"{server.url}/vtprune/config").json()
    finally:
        stop_server(server)
    found = json.loads((tmp_path / "presets" / "presets.json").read_text())
    assert found["presets"] == read(tmp_path / "local")["presets"]
    assert found["model"]["weights"] == fingerprint(str(DEMO_MODEL))
    fired = fires(gate, states)
    assert 0 < fired.sum() < len(fired)
    leaving = Setting(kv=AS_SCHEDULED, schedule=(PruneLayer(3, 0.0, "vision"),))
    whole, left = runner.answer(Setting()), runner.answer(leaving)
    for reply, leaves, stay, leave in zip(replies, fired, whole, left, strict=True):
        assert reply.text == (leave if leaves else stay).text
        # the text, and what of the picture is among the last tokens, which always stay
        n, text = leave.by_band
        assert reply.by_band == ((n, n, n, text, text) if leaves else (n,) * 5)
    assert [reply.text for reply in refused] == [stay.text for stay in whole]
    for decision, count in (("leave", fired.sum()), ("stay", (~fired).sum())):
        assert f'vtprune_kv_gate_decisions_total{{decision="{decision}"}} {float(count)}' in metrics
    assert config["model"]["prune_gate"] == 3
    local, remote = read(tmp_path / "local"), read(tmp_path / "server")
    for name in ("prune_layers", "needed", "cost", "layers", "window", "relevance"):
        assert remote[name] == local[name], name
    assert remote["model"]["weights"] == local["model"]["weights"]
    assert remote["scores"]["searched"] == local["scores"]["searched"]
    assert remote["scores"]["held_out"]["calibrated"] == local["scores"]["held_out"]["calibrated"]
    assert remote["kendall_tau"] is None
    assert remote["presets"] == local["presets"]


@pytest.mark.engine
def test_the_engine_drops_what_was_calibrated(calibrated: Path, tmp_path: Path) -> None:
    """`vtprune serve --prune-schedule` answers as the calibration's own runner does."""
    found, questions = read(calibrated), drawn_questions("test", SCENES, 168)
    schedule = resolve(str(calibrated / "schedule.json"), found["layers"])
    relevance = ",".join(schedule.relevance or ())
    setting = Setting(kv=AS_SCHEDULED, schedule=schedule.prune_layers, relevance=relevance)
    expected = LocalRunner(LocalModel(str(DEMO_MODEL)), questions, frozenset()).answer(setting)
    server = start_server(tmp_path / "log", "--prune-schedule", str(calibrated / "schedule.json"))
    try:
        replies = RemoteRunner(server.url, questions).answer(Setting(kv=AS_SCHEDULED))
        config = httpx.get(f"{server.url}/vtprune/config").json()
    finally:
        stop_server(server)
    assert [(r.text, r.prompt_tokens_kept) for r in replies] == [
        (e.text, e.prompt_tokens_kept) for e in expected
    ]
    assert [p["layer"] for p in config["model"]["prune_layers"]] == [p.layer for p in schedule.prune_layers]
    assert config["presets"]["balanced"]["aggressiveness"] == found["presets"]["balanced"]
