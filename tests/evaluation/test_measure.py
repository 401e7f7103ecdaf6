# SPDX-License-Identifier: Apache-2.0
"""From replies to numbers, with a runner whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_vtprune.contract import PRESETS
from vllm_vtprune.settings import KVSettings, VisionSettings
from vtprune_eval.backend import Reply
from vtprune_eval.measure import evaluate
from vtprune_eval.report import dump
from vtprune_eval.scene_questions import KINDS
from vtprune_eval.setting import Setting
from vtprune_eval.tables import by_kind, content, summary
from vtprune_eval.tasks import Question, Questions, drawn_questions, file_questions, write_questions
from vtprune_loadtest.questions import DataError, is_right, normalised

PICTURES, N = 40, 100
BALANCED = Setting(VisionSettings(aggressiveness=0.5))


class FakeRunner:
    """Says `answer(setting, question number)` and keeps 10 tokens a shape."""

    name, layers, draws = "fake", 4, 4
    baselines = ("random", "uniform")

    def __init__(self, answer: Callable[[Setting, int], str]) -> None:
        self._answer = answer
        picture = Image.new("RGB", (4, 4))
        asked = [
            Question(number // 2, ("colour", "count")[number % 2], "?", ("yes",), held_out=number < 4)
            for number in range(2 * PICTURES)
        ]
        self.shapes = 1 + np.arange(PICTURES) % 6
        owner = np.where(np.arange(N) < 5 * self.shapes[:, None], np.arange(N) // 5, -1)
        self.questions = Questions("made up", [picture] * PICTURES, asked, self.shapes, owner)

    def answer(self, setting: Setting) -> list[Reply]:
        replies = []
        for number, question in enumerate(self.questions.asked):
            kept = N if setting.vision.keeps_all else int(10 * self.shapes[question.picture])
            prompt = kept + 20
            above = prompt if not setting.kv.drops else round(prompt * setting.kv.keep)
            replies.append(Reply(self._answer(setting, number), N, kept, prompt, above))
        return replies


def quiet(_line: str) -> None:
    pass


def test_accuracy_agreement_and_margins() -> None:
    def answer(setting: Setting, number: int) -> str:
        if not setting.prunes:
            return "yes" if number % 10 else "no"  # 72 of 80 right
        if setting.vision.method == "inflection":
            return "yes" if number % 8 else "maybe"  # 70 of 80
        if setting.vision.method == "uniform":
            return "yes" if number % 2 else "no"  # 40 of 80
        return "yes" if setting.draw < 2 else "no"  # random: half of the draws get everything right

    unpruned, row = evaluate(FakeRunner(answer), [BALANCED], quiet)["rows"]
    assert unpruned["accuracy"]["value"] == 0.9
    assert unpruned["agreement"]["value"] == 1
    assert row["accuracy"]["value"] == 0.875
    # the ten multiples of 8 and the eight of 10 differ; 0 and 40 are both
    assert row["agreement"]["value"] == 1 - (10 + 8 - 2) / 80
    assert row["versus"]["random"] == {**row["versus"]["random"], "draws": 4}
    assert row["versus"]["random"]["accuracy"]["value"] == 0.5
    assert row["versus"]["random"]["difference"]["value"] == 0.375
    assert row["versus"]["uniform"]["difference"]["value"] == 0.375
    assert row["versus"]["uniform"]["difference"]["low"] > 0
    assert row["versus"]["unpruned"]["difference"]["value"] == -0.025
    assert row["by_kind"]["colour"]["value"] == 30 / 40
    assert row["by_kind"]["count"]["value"] == 1
    assert row["by_kind"]["held out"] == {**row["by_kind"]["held out"], "value": 0.75, "asked": 4}


def test_shares_and_content() -> None:
    document = evaluate(FakeRunner(lambda setting, number: "yes"), [BALANCED], quiet)
    row = document["rows"][1]
    mean = float(np.mean(10 * FakeRunner(lambda s, n: "").shapes))
    assert row["vision_tokens_kept"] == pytest.approx(mean)
    assert row["share_kept"] == pytest.approx(mean / N)
    assert row["cache_share"] == pytest.approx((mean + 20) / 120, abs=1e-4)
    assert row["content"]["correlation_with_shapes"]["value"] == pytest.approx(1)
    assert row["content"]["correlation_with_object_patches"]["value"] == pytest.approx(1)
    assert row["content"]["kept_by_shapes"] == {str(n): 10.0 * n for n in range(1, 7)}
    json.dumps(document, allow_nan=False)
    assert json.loads(dump(document)) == document
    assert len([line for line in dump(document).splitlines() if "label" in line]) == 2
    text = "\n".join((summary(document), by_kind(document["rows"]), content(document["rows"])))
    assert "inflection aggressiveness=0.5" in text


def test_stage_2_is_compared_with_dropping_at_random() -> None:
    setting = Setting(kv=KVSettings(0.5), prune_layer=1)
    runner = FakeRunner(lambda setting, number: "no" if setting.relevance == "random" else "yes")
    row = evaluate(runner, [setting], quiet)["rows"][1]
    assert row["cache_share"] == pytest.approx(0.25 + 0.75 / 2)
    assert row["versus"]["random"]["difference"]["value"] == 1
    assert set(row["versus"]) == {"random", "unpruned"}


def test_random_is_averaged_over_its_draws() -> None:
    random = Setting(VisionSettings(method="random", aggressiveness=0.5))
    runner = FakeRunner(lambda setting, number: "yes" if setting.draw == 0 else "no")
    row = evaluate(runner, [random], quiet)["rows"][1]
    assert row["accuracy"]["value"] == 0.25
    assert "random" not in row["versus"]


def test_presets_are_those_of_the_contract() -> None:
    for name, preset in PRESETS.items():
        setting = Setting.preset(name, prune_layer=1)
        assert (setting.vision.aggressiveness, setting.kv.keep) == (preset.aggressiveness, preset.kv_keep)
    with pytest.raises(ValueError, match="balanced"):
        Setting.preset("bold")


def test_settings_have_labels_of_their_own() -> None:
    settings = [
        Setting(VisionSettings(method=method, **amount), kv, layer, window, relevance)
        for method in ("inflection", "topk")
        for amount in ({"aggressiveness": 0.5}, {"aggressiveness": None, "keep_ratio": 0.5})
        for kv in (KVSettings(0.5), KVSettings(0.5, "vision"), KVSettings(0.25))
        for layer in (1, 2)
        for window in (4, 8)
        for relevance in ("attention", "no_rope")
    ]
    assert len({setting.label for setting in settings}) == len(settings)


def test_scenes_are_asked_about_once_per_kind() -> None:
    questions = drawn_questions("test", 20, 168)
    pairs = [(question.picture, question.kind) for question in questions.asked]
    assert len(set(pairs)) == len(pairs)
    assert {kind for _, kind in pairs} == set(KINDS)
    assert any(question.held_out for question in questions.asked)
    assert not any(question.held_out for question in drawn_questions("validation", 20, 168).asked)
    assert questions.objects is not None
    assert questions.objects.shape == (20, 144)


@pytest.mark.parametrize(
    ("reply", "right"),
    [("red", True), ("Red.", True), ("the red", True), ("dark red", False), ("", False), ("reddish", False)],
)
def test_answers_are_compared_without_case_articles_and_signs(reply: str, right: bool) -> None:
    assert is_right(reply, ("red", "crimson")) is right


def test_hyphens_tell_places_apart() -> None:
    assert normalised("Top-left!") == "top-left" != normalised("top left")


def test_questions_from_a_file(tmp_path: Path) -> None:
    Image.new("L", (5, 7)).save(tmp_path / "grey.png")
    lines = [
        {"image": "grey.png", "question": "What?", "answer": ["cat", "a cat"], "kind": "animal"},
        {"image": "grey.png", "question": "How many?", "answer": 2},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    questions = file_questions(path, suffix="One word.")
    assert len(questions.pictures) == 1
    assert questions.pictures[0].mode == "RGB"
    assert [(q.kind, q.text, q.answers) for q in questions.asked] == [
        ("animal", "What? One word.", ("cat", "a cat")),
        ("other", "How many? One word.", ("2",)),
    ]


def test_drawn_questions_written_to_a_file_are_read_back(tmp_path: Path) -> None:
    drawn = drawn_questions("test", 3, 168)
    write_questions(drawn, tmp_path / "sub" / "scenes.jsonl")
    read = file_questions(tmp_path / "sub" / "scenes.jsonl")
    assert [(q.picture, q.kind, q.text, q.answers) for q in read.asked] == [
        (q.picture, q.kind, q.text, q.answers) for q in drawn.asked
    ]
    for one, other in zip(read.pictures, drawn.pictures, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    ("text", "blamed"),
    [
        ("", "holds no question"),
        ("{", "line 1"),
        ('{"image": "a.png", "question": "?"}', "line 1.*answer"),
        ('\n["a"]', "line 2"),
        ('{"image": "missing.png", "question": "?", "answer": "x"}', "missing.png"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, blamed: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=blamed):
        file_questions(path)
    with pytest.raises(DataError, match="cannot be read"):
        file_questions(tmp_path / "none.jsonl")
