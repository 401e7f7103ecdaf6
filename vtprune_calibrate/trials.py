# SPDX-License-Identifier: Apache-2.0
"""Trials: a schedule put to questions, each once, remembered in the journal; and what it costs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.kv_drop.schedule import PruneLayer
from vllm_vtprune.kv_drop.shares import tokens_kept
from vllm_vtprune.settings import KVSettings
from vtprune_calibrate.journal import Journal
from vtprune_eval import statistics
from vtprune_eval.backend import Reply, Runner
from vtprune_eval.flops import CostShape, RequestShape, kv_bytes, rating_flops, request_work
from vtprune_eval.setting import AS_SCHEDULED, Setting
from vtprune_eval.tasks import Questions
from vtprune_loadtest.questions import is_right, normalised
from vtprune_loadtest.shares import Interval

Floats = NDArray[np.float64]


class JournaledRunner:
    """A runner whose replies are looked up in a journal first; it advances a progress bar."""

    def __init__(
        self, make: Callable[[], Runner], questions: Questions, part: str, journal: Journal, bar: Bar
    ) -> None:
        """Nothing is loaded before the first trial that the journal lacks.

        Args:
            make: the runner that answers.
            questions: its questions.
            part: of the calibration, so that two sets of questions do not mix.
            journal: where replies are kept.
            bar: told of every trial.
        """
        self.questions = questions
        self._make, self._part, self._journal, self._bar = make, part, journal, bar
        self._shown = set[str]()

    @cached_property
    def runner(self) -> Runner:
        """What answers."""
        return self._make()

    @property
    def name(self) -> str:
        """The model's."""
        return self.runner.name

    @property
    def layers(self) -> int | None:
        """Its decoder layers."""
        return self.runner.layers

    @property
    def draws(self) -> int:
        """How many draws of `random` it can make."""
        return self.runner.draws

    @property
    def baselines(self) -> Sequence[str]:
        """Of the runner's, what costs as much at a prune layer."""
        return ("random",)

    def answer(self, setting: Setting) -> Sequence[Reply]:
        """One reply per question, in their order; see `Runner`."""
        key = json.dumps([self._part, setting.as_dict(), setting.draw], sort_keys=True)
        replies = self._journal.get(key)
        if replies is None:
            replies = list(self.runner.answer(setting))
            self._journal.put(key, replies)
        if key not in self._shown:
            self._shown.add(key)
            self._bar.step(f"{self._part}: {setting.label}")
        return replies


class Bar:
    """A progress bar on a terminal; elsewhere a line for every trial."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._done = 0

    def expect(self, trials: int, what: str) -> None:
        """Begin a part of at most so many trials."""
        self.close()
        self._done = 0
        if sys.stderr.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped]  # comes with vLLM

            self._bar = tqdm(total=trials, desc=what, unit="trial", file=sys.stderr)
        else:
            print(f"{what}: at most {trials} trials", flush=True)

    def step(self, what: str) -> None:
        """One trial is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(what[-60:], refresh=False)
            self._bar.update()
        else:
            print(f"  {self._done} {what}", flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@dataclass(frozen=True)
class Trials:
    """Schedules put to one set of questions.

    Attributes:
        runner: what answers.
        base: stage 1, the window and the rating of every trial.
        by: `answers`: a reply counts where it is right; `agreement`: where it is the unpruned one's.
        borders: the prune layers that a server has, each asked for its share in every request; None where
            any schedule can be run.
    """

    runner: Runner
    base: Setting
    by: str = "answers"
    borders: tuple[int, ...] | None = None

    def setting(self, schedule: Sequence[PruneLayer]) -> Setting:
        """The setting that tries a schedule; an empty one drops nothing."""
        if not schedule:
            return self.base
        if self.borders is None:
            return replace(self.base, kv=AS_SCHEDULED, schedule=tuple(schedule))
        shares = [prune_layer.share for prune_layer in self._at_borders(schedule)]
        return replace(self.base, kv=KVSettings.of(shares, "vision", gate=False))

    def _at_borders(self, schedule: Sequence[PruneLayer]) -> list[PruneLayer]:
        """The same schedule with a share for each of the server's prune layers."""
        assert self.borders is not None
        below = {border: [p.share for p in schedule if p.layer <= border] for border in self.borders}
        return [PruneLayer(border, (1.0, *shares)[-1], "vision") for border, shares in below.items()]

    def right(self, schedule: Sequence[PruneLayer]) -> Floats:
        """1 where a question is answered as it should be, [Q]."""
        return self.judged(self.runner.answer(self.setting(schedule)))

    def judged(self, replies: Sequence[Reply]) -> Floats:
        """1 where a reply is as it should be, [Q]."""
        asked = self.runner.questions.asked
        if self.by == "agreement":
            whole = self.runner.answer(self.base)
            same = [normalised(a.text) == normalised(b.text) for a, b in zip(replies, whole, strict=True)]
            return np.array(same, dtype=np.float64)
        pairs = zip(replies, asked, strict=True)
        return np.array(
            [is_right(reply.text, question.answers) for reply, question in pairs], dtype=np.float64
        )

    def score(self, schedule: Sequence[PruneLayer]) -> float:
        """The share answered as it should be."""
        return float(self.right(schedule).mean())

    def interval(self, schedule: Sequence[PruneLayer]) -> Interval:
        """The same with its interval."""
        return statistics.share(self.right(schedule), self.runner.questions.picture_of)

    def cost(self, schedule: Sequence[PruneLayer], costs: Costs) -> Cost:
        """What its prompts took."""
        counted = schedule if self.borders is None or not schedule else self._at_borders(schedule)
        return costs.of_replies(self.runner.answer(self.setting(schedule)), counted, self.base.relevances)


@dataclass(frozen=True)
class Cost:
    """Means over prompts: operations of the decoder's prefill, ratings included, and bytes of KV cache."""

    flops: float
    kv_bytes: float


class Costs:
    """What schedules cost a set of prompts."""

    def __init__(self, shape: CostShape, replies: Sequence[Reply], window: int) -> None:
        """Read the prompts' lengths.

        Args:
            shape: the model's.
            replies: to the prompts, nothing dropped in the decoder.
            window: last prompt tokens that rate the others.
        """
        self._shape, self._window = shape, window
        self._prompts = Counter((reply.prompt_tokens, reply.vision_tokens_kept) for reply in replies)

    @cached_property
    def whole(self) -> Cost:
        """With nothing dropped."""
        return self.of((), ("",))

    def of(self, schedule: Sequence[PruneLayer], relevance: Sequence[str]) -> Cost:
        """Of a schedule of shares of the visual tokens; the last rating holds for the rest."""
        seen: Counter[tuple[int, ...]] = Counter()
        for (tokens, visual), times in self._prompts.items():
            seen[tokens, *tokens_kept(tokens, visual, tokens - visual, schedule)] += times
        return self._mean(seen, schedule, relevance)

    def of_replies(
        self, replies: Sequence[Reply], schedule: Sequence[PruneLayer], relevance: Sequence[str]
    ) -> Cost:
        """Of prompts as they were counted."""
        seen = Counter(reply.by_band[: len(schedule) + 1] for reply in replies)
        return self._mean(seen, schedule, relevance)

    def _mean(
        self, seen: Counter[tuple[int, ...]], schedule: Sequence[PruneLayer], relevance: Sequence[str]
    ) -> Cost:
        flops = held = 0.0
        for (tokens, *above), times in seen.items():
            layers = (prune_layer.layer for prune_layer in schedule)
            request = RequestShape(0, tokens, 0, 1, tuple(zip(layers, above, strict=True)))
            flops += times * request_work(self._shape, request)["prefill"].flops
            flops += times * self._rating((tokens, *above), schedule, relevance)
            held += times * kv_bytes(self._shape, request)
        return Cost(flops / seen.total(), held / seen.total())

    def _rating(self, seen: Sequence[int], schedule: Sequence[PruneLayer], relevance: Sequence[str]) -> float:
        """Of a prompt, where something leaves and more than the text goes on."""
        flops = 0.0
        for at, (prune_layer, (reaching, kept)) in enumerate(zip(schedule, pairwise(seen), strict=True)):
            if prune_layer.share and kept < reaching:
                rating = relevance[min(at, len(relevance) - 1)]
                flops += rating_flops(self._shape, rating, reaching, self._window)
        return flops
