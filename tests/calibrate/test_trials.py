# SPDX-License-Identifier: Apache-2.0
"""Trials on a made-up runner: what is asked of it, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vllm_vtprune.kv_drop.schedule import PruneLayer, parse
from vllm_vtprune.kv_drop.shares import tokens_kept
from vllm_vtprune.settings import KVSettings
from vtprune_calibrate.comparison import compare
from vtprune_calibrate.journal import Journal
from vtprune_calibrate.trials import Bar, Costs, JournaledRunner, Trials
from vtprune_eval.backend import Reply
from vtprune_eval.flops import CostShape, rating_flops
from vtprune_eval.setting import AS_SCHEDULED, Setting
from vtprune_eval.tasks import Question, Questions

SHAPE = CostShape(0, 0, 0, 0, 0, 64, 128, 8, 64, 32, 100, 2)
BORDERS = (2, 4, 6)
TEXT, VISUAL = 20, 100
QUESTIONS = Questions(
    "two", [Image.new("RGB", (8, 8))] * 2, [Question(n, "any", "What?", ("yes",)) for n in (0, 0, 1, 1)]
)


class Counting:
    """Answers right where more than half of the visual tokens reach the last band."""

    name, layers, draws, baselines = "counting", 8, 5, ("random",)
    questions = QUESTIONS

    def __init__(self) -> None:
        self.asked: list[Setting] = []

    def answer(self, setting: Setting) -> Sequence[Reply]:
        self.asked.append(setting)
        schedule = setting.schedule
        if setting.kv.drops and not schedule:
            pairs = zip(BORDERS, setting.kv.shares, strict=True)
            schedule = tuple(PruneLayer(border, share, "vision") for border, share in pairs)
        kept = tokens_kept(TEXT + VISUAL, VISUAL, TEXT, schedule) or [TEXT + VISUAL]
        text = "yes" if kept[-1] > TEXT + VISUAL / 2 else "no"
        whole = TEXT + VISUAL
        return [Reply(text, VISUAL, VISUAL, whole, kept[0], tuple(kept[1:]))] * len(QUESTIONS.asked)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("2:vision=0.8,6:vision=0.3", (0.8, 0.8, 0.3)),
        ("4:vision=0.5", (1.0, 0.5, 0.5)),
        ("4:0", (1.0, 0.0, 0.0)),
        ("6:vision=0.25", (1.0, 1.0, 0.25)),
    ],
)
def test_a_server_is_asked_for_a_share_at_each_of_its_prune_layers(
    schedule: str, shares: tuple[float, ...]
) -> None:
    local, server = Counting(), Counting()
    trials = [Trials(local, Setting()), Trials(server, Setting(), borders=BORDERS)]
    costs = Costs(SHAPE, local.answer(Setting()), window=4)
    found = [one.cost(parse(schedule), costs) for one in trials]
    assert local.asked[-1] == Setting(kv=AS_SCHEDULED, schedule=parse(schedule))
    # a gate of the server's has no part in a schedule
    assert server.asked[-1] == Setting(kv=replace(KVSettings.of(shares, "vision"), gate=False))
    assert found[0] == found[1] == costs.of(parse(schedule), ["attention"])
    assert trials[0].score(parse(schedule)) == trials[1].score(parse(schedule))


def test_a_rating_costs_where_it_chooses() -> None:
    costs = Costs(SHAPE, Counting().answer(Setting()), window=4)
    schedule = parse("2:vision=0.5,4:vision=0.25,6:0")
    free = costs.of(schedule, ["inherited"])
    rated = costs.of(schedule, ["pagerank", "attention"])
    expected = rating_flops(SHAPE, "pagerank", 120, 4) + rating_flops(SHAPE, "attention", 70, 4)
    assert rated.flops - free.flops == pytest.approx(expected)
    assert rated.kv_bytes == free.kv_bytes == 2 * (120 + 70 + 45 + 20) * 2 * 32 * 2


def test_agreement_needs_no_answers() -> None:
    trials = Trials(Counting(), Setting(), by="agreement")
    assert trials.score(()) == 1 == trials.score(parse("4:vision=0.6"))
    assert trials.score(parse("4:vision=0.4")) == 0


def test_a_row_has_random_dropping_beside_it_where_there_is_a_choice() -> None:
    local = Counting()
    costs = Costs(SHAPE, local.answer(Setting()), window=4)
    row = compare(Trials(local, Setting()), costs, "half", parse("4:vision=0.4"))
    assert row["accuracy"]["value"] == 0 and row["versus"]["unpruned"]["difference"]["value"] == -1
    assert {(s.relevance, s.draw) for s in local.asked[-3:]} == {("random", draw) for draw in range(3)}
    assert set(compare(Trials(local, Setting()), costs, "exit", parse("4:0"))["versus"]) == {"unpruned"}
    server = Trials(Counting(), Setting(), borders=BORDERS)
    assert set(compare(server, costs, "half", parse("4:vision=0.4"))["versus"]) == {"unpruned"}


def test_a_trial_is_asked_once_over_all_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: list[Counting] = []

    def make() -> Counting:
        made.append(Counting())
        return made[-1]

    for _ in range(2):
        runner = JournaledRunner(make, QUESTIONS, "search", Journal(tmp_path / "journal", {}), Bar())
        trials = Trials(runner, Setting())
        rights = [trials.right(parse("4:vision=0.6")) for _ in range(2)]
        np.testing.assert_array_equal(rights, np.ones((2, 4)))
    assert len(made) == 1 and len(made[0].asked) == 1
    assert capsys.readouterr().out.count("search: 4:vision=0.6") == 2
