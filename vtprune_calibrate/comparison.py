# SPDX-License-Identifier: Apache-2.0
"""Schedules side by side: answers with intervals, what they cost, and random dropping at the same counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vllm_vtprune.kv_drop.schedule import PruneLayer
from vtprune_calibrate.trials import Costs, Floats, Trials
from vtprune_eval import statistics
from vtprune_eval.tables import Row, interval, markdown, percent, points

#: Shares of the visual tokens that a single prune layer is tried with.
ALONE = (0.75, 0.5, 0.25, 0.125, 0.0)
DRAWS = 3


def compare(
    trials: Trials,
    costs: Costs,
    name: str,
    schedule: Sequence[PruneLayer],
    relevance: str | None = None,
    *,
    chance: bool = True,
) -> Row:
    """One schedule's row.

    Args:
        trials: the questions.
        costs: of their prompts.
        name: the row's.
        schedule: the prune layers; none for the unpruned row.
        relevance: its own rating; None for that of the trials.
        chance: whether random dropping is tried beside it.

    Returns:
        `name`, `schedule`, `relevance`, `flops` and `kv_bytes` (shares of the unpruned prompts'),
        `accuracy`, and where something is dropped `versus`: the differences to the unpruned model and to
        random dropping. There is no such entry where nothing but exits is scheduled, which leave no choice,
        nor from a server, which no request makes drop at random.
    """
    if relevance is not None:
        trials = replace(trials, base=replace(trials.base, relevance=relevance))
    owners = trials.runner.questions.picture_of
    right, cost = trials.right(schedule), trials.cost(schedule, costs)
    row: Row = {
        "name": name,
        "schedule": ",".join(map(str, schedule)),
        "relevance": trials.base.relevance if rates(schedule) else None,
        "flops": round(cost.flops / costs.whole.flops, 4),
        "kv_bytes": round(cost.kv_bytes / costs.whole.kv_bytes, 4),
        "accuracy": statistics.share(right, owners).as_dict(),
        "versus": {},
    }
    if not schedule:
        return row
    whole = trials.right(())
    row["versus"]["unpruned"] = _versus(right, whole, trials)
    if chance and rates(schedule) and trials.borders is None:
        row["versus"]["random"] = _versus(right, _at_random(trials, schedule), trials)
    return row


def rates(schedule: Sequence[PruneLayer]) -> bool:
    """Whether a schedule chooses among tokens anywhere: an exit does not."""
    return any(prune_layer.share > 0 for prune_layer in schedule)


def one_border(trials: Trials, costs: Costs, borders: Sequence[int]) -> list[Row]:
    """Single prune layers with every share of `ALONE`."""
    return [
        compare(trials, costs, f"layer {border}", (PruneLayer(border, share, "vision"),), chance=False)
        for border in borders
        for share in ALONE
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    header = ["schedule", "prune layers", "rating", "FLOPs", "KV bytes", "right", "less than unpruned"]
    header.append("over random")
    return markdown(
        header,
        [
            [
                row["name"],
                f"`{row['schedule']}`" if row["schedule"] else "–",
                row["relevance"] or "–",
                percent(row["flops"]),
                percent(row["kv_bytes"]),
                interval(row["accuracy"]),
                *(points(row["versus"].get(other, {}).get("difference")) for other in ("unpruned", "random")),
            ]
            for row in rows
        ],
    )


def _at_random(trials: Trials, schedule: Sequence[PruneLayer]) -> Floats:
    drawn = [
        trials.judged(trials.runner.answer(replace(trials.setting(schedule), relevance="random", draw=draw)))
        for draw in range(DRAWS)
    ]
    mean: Floats = np.mean(np.stack(drawn), axis=0)
    return mean


def _versus(right: Floats, other: Floats, trials: Trials) -> dict[str, Any]:
    owners = trials.runner.questions.picture_of
    return {
        "accuracy": statistics.share(other, owners).as_dict(),
        "difference": statistics.difference(right, other, owners).as_dict(),
    }
