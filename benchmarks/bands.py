# SPDX-License-Identifier: Apache-2.0
"""Schedules of one, two and three prune layers that cost the same, so that only their number differs."""

from __future__ import annotations

from vllm_vtprune.kv_drop.schedule import PruneLayer
from vllm_vtprune.kv_drop.shares import tokens_kept
from vtprune_eval.flops import CostShape, RequestShape, request_work


def prefill_flops(shape: CostShape, text: int, visual: int, schedule: tuple[PruneLayer, ...]) -> float:
    """Operations of a prompt's prefill under a schedule of shares of the visual tokens."""
    kept = tokens_kept(text + visual, visual, text, schedule)
    bands = tuple((p.layer, tokens) for p, tokens in zip(schedule, kept, strict=True))
    return request_work(shape, RequestShape(1, text, visual, 1, bands))["prefill"].flops


def equal_cost(
    shape: CostShape, text: int, visual: int, borders: int, budget: float
) -> tuple[PruneLayer, ...]:
    """Evenly spaced prune layers, each with the same share of the tokens below it, that cost a budget.

    Args:
        shape: the model's.
        text: text tokens of the prompt.
        visual: vision tokens of the prompt.
        borders: how many prune layers.
        budget: operations of the prefill; what is found costs no more, by less than a token in each band.
    """

    def schedule(share: float) -> tuple[PruneLayer, ...]:
        layers = (round(shape.layers * n / (borders + 1)) for n in range(1, borders + 1))
        return tuple(
            PruneLayer(layer, round(share**power, 4), "vision") for power, layer in enumerate(layers, start=1)
        )

    low, high = 0.01, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if prefill_flops(shape, text, visual, schedule(middle)) <= budget:
            low = middle
        else:
            high = middle
    return schedule(low)
