# SPDX-License-Identifier: Apache-2.0
"""The evaluation's runner on transformers against the plain reference."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.checkpoints import random_llava
from tests.reference import Reference, Request
from vllm_vtprune.kv_drop.schedule import parse
from vllm_vtprune.selection import METHODS
from vllm_vtprune.settings import KVSettings, VisionSettings
from vllm_vtprune.vision.features import needs_of
from vtprune_eval.backend import RunnerError
from vtprune_eval.downscale import SmallerPictures, smaller_grid
from vtprune_eval.scenes import make_scene
from vtprune_eval.setting import AS_SCHEDULED, DOWNSCALE, Setting
from vtprune_eval.tasks import Question, Questions
from vtprune_eval.transformers_backend import LocalModel, LocalRunner

LAYERS, LIMIT = 4, 5
TEXTS = ("What is it?", "Where?", "A longer question about what the picture shows, to be padded to?")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "llava"
    return random_llava(folder, layers=LAYERS, heads=4, kv_heads=2, hidden=64, weight_scale=4.0)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LocalModel:
    return LocalModel(str(checkpoint))


@pytest.fixture(scope="module")
def questions() -> Questions:
    pictures = [Image.fromarray(make_scene("train", index).pixels) for index in range(3)]
    asked = [Question(number, "any", text, ("x",)) for number in range(3) for text in TEXTS]
    return Questions("three", pictures, asked)


@pytest.fixture(scope="module")
def runner(model: LocalModel, questions: Questions) -> LocalRunner:
    outputs = needs_of([VisionSettings(method=name, aggressiveness=0.5) for name in METHODS])
    return LocalRunner(model, questions, outputs, LIMIT)


SETTINGS = [
    Setting(),
    Setting(VisionSettings(aggressiveness=0.3)),
    Setting(VisionSettings(aggressiveness=0.5)),
    Setting(VisionSettings(aggressiveness=1.0)),
    Setting(VisionSettings(aggressiveness=None, keep_ratio=0.22)),
    Setting(kv=KVSettings(0.5), prune_layer=1),
    Setting(kv=KVSettings(0.25, "vision"), prune_layer=2),
    Setting(kv=KVSettings(0.01), prune_layer=3, window=4),
    Setting(VisionSettings(aggressiveness=0.5), KVSettings(0.5), 2),
    Setting(VisionSettings(aggressiveness=0.5), KVSettings(0.75, "vision"), 3, window=16),
    Setting(kv=KVSettings(0.25), prune_layer=2, relevance="last_token"),
    Setting(kv=KVSettings(0.25), prune_layer=2, relevance="no_rope"),
    Setting(kv=AS_SCHEDULED, schedule=parse("1:0.6,2:0.4,3:0.2")),
    Setting(kv=AS_SCHEDULED, schedule=parse("1:vision=0.5,3:0"), relevance="pagerank"),
    Setting(kv=AS_SCHEDULED, schedule=parse("2:0")),
    Setting(kv=AS_SCHEDULED, schedule=parse("1,2:vision=0.3,3:vision=0.1"), relevance="key_norm,inherited"),
    Setting(VisionSettings(aggressiveness=0.3), KVSettings.of((1.0, 0.3)), schedule=parse("1:0.8,3:0.5")),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.label)
def test_a_batch_answers_as_the_reference_answers_each_question(
    setting: Setting, runner: LocalRunner, checkpoint: Path, questions: Questions
) -> None:
    layers = tuple((p.layer, p.share, p.of) for p in setting.prune_layers)
    reference = Reference(checkpoint, layers, setting.window, setting.relevances)
    decode, end = runner.model.processor.tokenizer.decode, runner.model.decoder.stop
    replies = runner.answer(setting)
    assert len(replies) == len(questions.asked)
    for question, reply in zip(questions.asked, replies, strict=True):
        expected = reference.answer(
            Request(
                f"USER: <image>\n{question.text} ASSISTANT:",
                (questions.pictures[question.picture],),
                aggressiveness=setting.vision.aggressiveness or 0.0,
                keep_ratio=setting.vision.keep_ratio,
                kv_keep=setting.kv.shares,
                kv_scope=setting.kv.scope,
                max_tokens=LIMIT,
            )
        )
        tokens = expected.token_ids
        tokens = tokens[: next((at for at, token in enumerate(tokens) if token in end), len(tokens))]
        assert reply.text == decode(tokens, skip_special_tokens=True).strip()
        assert reply.prompt_tokens == len(expected.prompt_ids)
        assert reply.by_band[-1] == len(expected.kept)


def test_the_answers_differ_so_that_equality_means_something(runner: LocalRunner) -> None:
    texts = [tuple(reply.text for reply in runner.answer(setting)) for setting in SETTINGS]
    assert len(set(texts)) > len(SETTINGS) // 2
    assert len(set(texts[0])) > 1


@pytest.mark.parametrize("method", METHODS)
def test_baselines_keep_as_many_tokens_of_every_picture(method: str, runner: LocalRunner) -> None:
    setting = Setting(VisionSettings(method=method, aggressiveness=0.5))
    kept = [reply.vision_tokens_kept for reply in runner.answer(setting)]
    for name in ("random", "uniform"):
        baseline = runner.answer(setting.baseline(name))
        assert [reply.vision_tokens_kept for reply in baseline] == kept


def test_a_smaller_picture_has_nearly_as_many_tokens(runner: LocalRunner, questions: Questions) -> None:
    setting = Setting(VisionSettings(aggressiveness=0.5))
    kept = [reply.vision_tokens_kept for reply in runner.answer(setting)]
    smaller = runner.answer(setting.baseline(DOWNSCALE))
    assert [reply.vision_tokens_kept for reply in smaller] == [
        math.prod(smaller_grid(runner.pictures.encoder.family.unpruned_grid(), count)) for count in kept
    ]
    alone = runner.answer(Setting(VisionSettings(method=DOWNSCALE, aggressiveness=0.5)))
    assert [reply.text for reply in alone] == [reply.text for reply in smaller]
    for name in ("random", "uniform"):  # beside as many tokens of the whole picture
        beside = runner.answer(Setting(VisionSettings(method=DOWNSCALE, aggressiveness=0.5)).baseline(name))
        assert [reply.vision_tokens_kept for reply in beside] == kept


def test_a_picture_as_small_as_it_is_large_is_the_picture(runner: LocalRunner, questions: Questions) -> None:
    whole = runner.pictures.embed(runner.pictures.select(Setting()))
    images, processor = questions.pictures, runner.model.processor.image_processor
    tokens = [runner.pictures.tokens] * len(images)
    for one, other in zip(
        SmallerPictures(runner.model.encoder, images, processor).embed(tokens), whole, strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", [(12, 12), (24, 24), (10, 30), (1, 7)], ids=str)
def test_the_smaller_grid_comes_near_the_count_and_the_shape(grid: tuple[int, int]) -> None:
    height, width = grid
    for count in range(1, height * width + 1):
        rows, columns = smaller_grid(grid, count)
        assert rows <= height
        assert columns <= width
        if min(grid) > 1 and count > 8:
            assert rows * columns == pytest.approx(count, abs=max(2, 0.1 * count))
            assert 3 / 4 - 1e-9 <= rows * width / (columns * height) <= 4 / 3 + 1e-9
    assert smaller_grid(grid, height * width) == grid


def test_draws_of_random_differ_and_repeat(runner: LocalRunner) -> None:
    setting = Setting(VisionSettings(aggressiveness=0.5))

    def kept(draw: int) -> list[list[int]]:
        return [
            chosen.indices.tolist() for chosen in runner.pictures.select(setting.baseline("random", draw))
        ]

    assert kept(0) == kept(0) != kept(1)


def test_dropping_at_random_keeps_the_count_and_other_tokens(runner: LocalRunner) -> None:
    setting = Setting(kv=KVSettings(0.25), prune_layer=2)
    chosen, random = runner.answer(setting), runner.answer(replace(setting, relevance="random"))
    assert [a.prompt_tokens_kept for a in chosen] == [a.prompt_tokens_kept for a in random]
    assert [a.text for a in chosen] != [a.text for a in random]


@pytest.mark.parametrize("layer", [None, LAYERS])
def test_dropping_needs_a_prune_layer_of_the_decoder(layer: int | None, runner: LocalRunner) -> None:
    with pytest.raises(RunnerError, match=f"1 to {LAYERS - 1}"):
        runner.answer(Setting(kv=KVSettings(0.5), prune_layer=layer))


def test_a_question_with_a_placeholder_is_refused(model: LocalModel, questions: Questions) -> None:
    asked = [Question(0, "any", "What is <image>?", ("x",))]
    with pytest.raises(RunnerError, match="placeholder"):
        LocalRunner(model, replace(questions, asked=asked), frozenset())


def test_pictures_keep_their_order(runner: LocalRunner, questions: Questions) -> None:
    assert np.array_equal(questions.picture_of, np.repeat(np.arange(3), len(TEXTS)))
    counts = [reply.vision_tokens_kept for reply in runner.answer(SETTINGS[2])]
    assert counts == [
        selection.count for selection in runner.pictures.select(SETTINGS[2]) for _ in range(len(TEXTS))
    ]


def test_a_method_that_reads_the_question_chooses_for_each_alone(
    model: LocalModel, runner: LocalRunner, questions: Questions
) -> None:
    setting = Setting(VisionSettings(method="cdpruner", aggressiveness=None, keep_ratio=0.2))
    together = runner.answer(setting)
    for number in (0, 4, 8):
        question = questions.asked[number]
        alone = Questions("one", [questions.pictures[question.picture]], [replace(question, picture=0)])
        assert LocalRunner(model, alone, frozenset(), LIMIT).answer(setting) == [together[number]]
    asked = [(number // 3, runner._relevance(number)) for number in range(9)]
    kept = [selection.indices for selection in runner.pictures.select_asked(setting, asked)]
    assert {len(indices) for indices in kept} == {29}
    assert not torch.equal(kept[0], kept[1]), "another question, another choice"


def test_an_interrupted_run_finds_its_replies(
    model: LocalModel, questions: Questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = LocalRunner(model, questions, frozenset(), LIMIT, tmp_path)
    replies = {setting: first.answer(setting) for setting in SETTINGS[:2]}
    again = LocalRunner(model, questions, frozenset(), LIMIT, tmp_path)
    monkeypatch.setattr(LocalRunner, "_answered", lambda *_: pytest.fail("it was run again"))
    assert {setting: again.answer(setting) for setting in SETTINGS[:2]} == replies
