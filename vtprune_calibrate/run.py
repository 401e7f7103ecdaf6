# SPDX-License-Identifier: Apache-2.0
"""One calibration: search on one part of the questions, confirm on the other, write file and plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_vtprune.settings import VisionSettings
from vtprune_calibrate import document
from vtprune_calibrate.arguments import Budget
from vtprune_calibrate.comparison import DRAWS, compare, one_border, table
from vtprune_calibrate.journal import Journal
from vtprune_calibrate.kendall import mean_tau
from vtprune_calibrate.plots import plot_costs
from vtprune_calibrate.presets import amounts, calibrated
from vtprune_calibrate.search import (
    SLOPES,
    STEPS,
    Found,
    PruneLayers,
    SearchError,
    at_borders,
    best_under_budget,
    by_layer,
    cover,
    least_shares,
)
from vtprune_calibrate.subject import Subject
from vtprune_calibrate.trials import Bar, Cost, Costs, JournaledRunner, Trials
from vtprune_eval.backend import Runner
from vtprune_eval.setting import Setting
from vtprune_eval.tables import Row
from vtprune_eval.tasks import Questions
from vtprune_eval.transformers_backend import LocalRunner

JOURNAL = "journal.jsonl"
#: Prompts on which layers' rankings are compared: each costs a matrix of all its token pairs.
_RANKED = 64
_MOST_ALONE = 4
#: Layers that G-Search begins at.
_STARTS = 4


@dataclass(frozen=True)
class Parts:
    """The questions that decide, and those that confirm."""

    search: Questions
    confirm: Questions


def held_out(questions: Questions, share: float) -> Parts:
    """Cut a file's questions by picture, evenly over the file.

    Raises:
        SearchError: a part would be empty.
    """
    count = len(questions.pictures)
    # one after the other as often as the share says
    confirm = [math.floor((n + 1) * share) > math.floor(n * share) for n in range(count)]
    if all(confirm) or not any(confirm):
        raise SearchError(
            f"{questions.name} has {count} picture{'s' if count > 1 else ''}: that leaves none to search "
            "on, or none to confirm on. Give more pictures, or another --hold-out."
        )
    return Parts(_some(questions, [not c for c in confirm]), _some(questions, confirm))


def _some(questions: Questions, wanted: Sequence[bool]) -> Questions:
    place = {old: new for new, old in enumerate(n for n, want in enumerate(wanted) if want)}
    asked = [replace(q, picture=place[q.picture]) for q in questions.asked if q.picture in place]
    return Questions(questions.name, [questions.pictures[old] for old in place], asked)


class Calibration:
    """A model, its questions and how they are asked."""

    def __init__(
        self, subject: Subject, parts: Parts, vision: VisionSettings, by: str, folder: Path, limit: int
    ) -> None:
        """Open the journal; nothing is loaded yet.

        Args:
            subject: the model.
            parts: the questions.
            vision: stage 1 below every schedule.
            by: see `Trials`.
            folder: of journal, schedule and plot.
            limit: tokens of an answer at most.

        Raises:
            JournalError: the folder holds another calibration's journal.
        """
        self.subject, self.shape = subject, subject.shape
        self.folder, self.parts, self.bar = folder, parts, Bar()
        # a server has a window and a rating of its own, which no request names
        self.base = Setting(vision)
        if subject.borders is None:
            self.base = Setting(vision, window=subject.window, relevance=subject.relevance)
        self.facts = {
            "model": {"name": subject.name, "weights": subject.weights},
            "data": {
                "name": f"{parts.search.name}; {parts.confirm.name} held out",
                "sha256": document.data_hash([parts.search, parts.confirm]),
                "questions": len(parts.search.asked),
                "held_out": len(parts.confirm.asked),
            },
            "stage_1": {"aggressiveness": vision.aggressiveness},
            "window": subject.window,
            "judged_by": by,
        }
        run = {**self.facts, "borders": subject.borders, "relevance": subject.relevance, "max_tokens": limit}
        journal = Journal(folder / JOURNAL, run)
        self.resumed = len(journal)

        def trials(questions: Questions, part: str) -> Trials:
            def make() -> Runner:
                return subject.make(questions, limit)

            runner = JournaledRunner(make, questions, part, journal, self.bar)
            return Trials(runner, self.base, by, subject.borders)

        self.search, self.confirm = trials(parts.search, "search"), trials(parts.confirm, "confirm")

    @cached_property
    def costs(self) -> Costs:
        """Of the prompts that decide."""
        return Costs(self.shape, self.search.runner.answer(self.base), self.subject.window)

    def _cost(self, schedule: PruneLayers) -> Cost:
        return self.costs.of(schedule, self.subject.relevance.split(","))

    @cached_property
    def costs_held_out(self) -> Costs:
        """Of the prompts that confirm."""
        return Costs(self.shape, self.confirm.runner.answer(self.base), self.subject.window)

    def find(
        self, wanted: float | Budget, bands: int, candidates: Sequence[int] | None = None
    ) -> tuple[Found, dict[str, Any]]:
        """Search for the schedule.

        The paper's G-Search begins at the first layer and spends the tolerance there, however badly that
        layer rates. Ours is run from a few layers on, the first among them, and the cheapest result is taken.

        Args:
            wanted: a tolerance (G-Search), or a budget (P-Sigmoid).
            bands: prune layers at most.
            candidates: prune layers that G-Search tries; None for all.

        Returns:
            What was found, and the facts of the search for the file.

        Raises:
            SearchError: nothing does what is wanted.
        """
        if isinstance(wanted, Budget):
            return self._under_budget(wanted, bands)
        borders = list(candidates or self.subject.borders or range(1, self.shape.layers))
        if self.subject.borders and not set(borders) <= set(self.subject.borders):
            raise SearchError(f"--candidates must be of the server's prune layers, {self.subject.borders}.")
        if not 1 <= borders[0] <= borders[-1] < self.shape.layers:
            raise SearchError(
                f"--candidates must be 1 to {self.shape.layers - 1} for {self.shape.layers} decoder layers."
            )
        starts = range(0, len(borders), math.ceil(len(borders) / _STARTS))
        bisections = math.ceil(math.log2(STEPS + 1))
        self.bar.expect(1 + sum(len(borders) - start for start in starts) * bisections, "searching")
        target = self.search.score(()) - wanted
        results = [self._needed(borders[start:], target) for start in starts]
        found = [
            (self._cost(schedule).kv_bytes, Found(schedule, curve), needed)
            for curve, needed in results
            if (schedule := cover(curve, bands, self.subject.borders))
        ]
        if not found:
            raise SearchError(
                f"at a tolerance of {wanted:g} every layer needs all visual tokens of these questions: give "
                "a larger --tolerance, or a --budget."
            )
        method = {
            "method": "G-Search (arXiv 2412.00556), bisected",
            "wanted": {"tolerance": wanted},
            "needed": [needed for _, needed in results],
        }
        # of equals the one that leaves more of the lower layers alone
        return min(reversed(found), key=lambda entry: entry[0])[1], method

    def _needed(self, borders: Sequence[int], target: float) -> tuple[tuple[float, ...], dict[str, float]]:
        """G-Search over these borders: the share that each decoder layer needs, and that at each border."""
        shares = least_shares(
            lambda tried: self.search.score(at_borders(borders, tried)), len(borders), target
        )
        curve = by_layer(at_borders(borders, shares), self.shape.layers)
        return tuple(curve), {str(border): share for border, share in zip(borders, shares, strict=True)}

    def _under_budget(self, budget: Budget, bands: int) -> tuple[Found, dict[str, Any]]:
        def cost(schedule: PruneLayers) -> float:
            found = self._cost(schedule)
            return found.flops if budget.unit == "flops" else found.kv_bytes

        whole = self.costs.whole
        most = budget.absolute(whole.flops if budget.unit == "flops" else whole.kv_bytes)
        self.bar.expect(len(SLOPES) + 5, "searching")
        found = best_under_budget(
            self.search.score, cost, most, self.shape.layers, bands, borders=self.subject.borders
        )
        method = {
            "method": "P-Sigmoid (arXiv 2412.00556) in our parametrisation: r(l) = 1 / (1 + exp(a (l - b)))",
            "wanted": {"budget": {budget.unit: budget.amount}},
            "sigmoid": {"a_times_layers": found.slope, "curve": [round(share, 4) for share in found.curve]},
        }
        return found, method

    def kendall_tau(self) -> list[list[float]] | None:
        """How alike the layers rank the visual tokens, mean over some prompts, [layers - 1] twice.

        None from a server, which tells no scores.
        """
        runner = local_runner(self.search)
        if runner is None:
            return None
        prompts = runner.prompts[:_RANKED]
        embeddings = runner.pictures.embed(runner.pictures.select(self.base))
        relevance, window = self.base.relevances[0], self.base.window
        ratings = runner.model.decoder.ratings(embeddings, prompts, window, relevance)
        return [[round(x, 3) for x in row] for row in mean_tau([r.numpy() for r in ratings]).tolist()]

    def presets(self) -> dict[str, float]:
        """The aggressiveness at which each preset keeps its share of these pictures."""
        runner = answering(self.search)
        pictures: Any = runner.pictures if isinstance(runner, LocalRunner) else runner
        return amounts(calibrated(pictures))

    def confirmed(self, schedule: PruneLayers, name: str = "calibrated") -> tuple[Row, Row, list[Row]]:
        """On questions held out: the unpruned row, the schedule's, and rows of single prune layers."""
        borders = self.few_borders()
        self.bar.expect(2 + DRAWS + 5 * len(borders), "confirming")
        unpruned = compare(self.confirm, self.costs_held_out, "unpruned", ())
        row = compare(self.confirm, self.costs_held_out, name, schedule)
        alone = one_border(self.confirm, self.costs_held_out, borders)
        self.bar.close()
        return unpruned, row, alone

    def few_borders(self) -> list[int]:
        """Prune layers to try alone: a server's, all of a shallow decoder, else those at its fifths."""
        if self.subject.borders:
            return list(self.subject.borders)
        layers = self.shape.layers
        every = range(1, layers)
        if len(every) <= _MOST_ALONE:
            return list(every)
        return [max(1, round(layers * n / (_MOST_ALONE + 1))) for n in range(1, _MOST_ALONE + 1)]


def local_runner(trials: Trials) -> LocalRunner | None:
    """What answers on transformers; None where a server does."""
    runner = answering(trials)
    return runner if isinstance(runner, LocalRunner) else None


def answering(trials: Trials) -> Runner:
    """What answers, behind the journal."""
    runner = trials.runner
    return runner.runner if isinstance(runner, JournaledRunner) else runner


def run(
    calibration: Calibration,
    wanted: float | Budget,
    bands: int,
    candidates: Sequence[int] | None,
    say: Callable[[str], None],
) -> list[Path]:
    """Search, confirm and write; returns the paths."""
    if calibration.resumed:
        say(f"{calibration.resumed} trials are in the journal and are not run again.")
    found, method = calibration.find(wanted, bands, candidates)
    unpruned, row, alone = calibration.confirmed(found.schedule)
    searched = calibration.search.interval(found.schedule)
    content = document.document(
        found.schedule,
        calibration.subject.relevance.split(","),
        calibration.shape.layers,
        {
            **calibration.facts,
            **method,
            "cost": {name: row[name] for name in ("flops", "kv_bytes")},
            "scores": {
                "searched": {
                    "unpruned": calibration.search.interval(()).as_dict(),
                    "calibrated": searched.as_dict(),
                },
                "held_out": {
                    "unpruned": unpruned["accuracy"],
                    "calibrated": row["accuracy"],
                    "versus": row["versus"],
                },
            },
            "one_prune_layer": alone,
            "kendall_tau": calibration.kendall_tau(),
            "presets": calibration.presets(),
        },
    )
    path = document.write(content, calibration.folder / "schedule.json")
    say(table([unpruned, row, *alone]))
    if content["kendall_tau"]:
        say(f"Kendall's tau between neighbouring layers: {_neighbours(content['kendall_tau'])}")
    return [path, *_plot(calibration, unpruned, alone, row)]


def _plot(calibration: Calibration, unpruned: Row, alone: Sequence[Row], row: Row) -> list[Path]:
    facts: Any = calibration.facts
    title = f"{facts['model']['name']}: {facts['data']['held_out']} questions held out"
    try:
        return [plot_costs(unpruned, alone, [row], title, calibration.folder / "schedule.png")]
    except ImportError:
        return []


def _neighbours(tau: Sequence[Sequence[float]]) -> str:
    return ", ".join(f"{tau[at][at + 1]:.2f}" for at in range(len(tau) - 1)) or "one layer only"
