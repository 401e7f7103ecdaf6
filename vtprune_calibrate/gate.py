# SPDX-License-Identifier: Apache-2.0
"""DyVTE's gate (arXiv 2411.19628), measured before anybody builds it into an engine.

At a prune layer a small trained network looks at the prompt's text and says whether all visual tokens may
leave there. The paper trains one for every layer, on whether the answer survives; here one is trained for
each exit that is asked about, on the questions that decide, and judged on others. It needs no engine, since
both answers of every question are known: with the exit and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vllm_vtprune.kv_drop.schedule import PruneLayer
from vtprune_calibrate.trials import Costs, Trials
from vtprune_eval import statistics
from vtprune_eval.tables import Row, interval, markdown, percent, points
from vtprune_eval.tasks import normalised
from vtprune_eval.transformers_backend import LocalRunner

#: Of the paper's gate.
_WIDTH = 2048
_EPOCHS, _BATCH, _RATE = 30, 32, 3e-4


def make_gate(hidden: int, seed: int = 0) -> nn.Sequential:
    """Two linear layers without bias around a GELU, as the paper's.

    Args:
        hidden: width of the decoder; the gate reads twice as much.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(2 * hidden, _WIDTH, bias=False), nn.GELU(), nn.Linear(_WIDTH, 2, bias=False)
    )


def train(gate: nn.Module, features: Tensor, survives: Tensor, seed: int = 0) -> None:
    """Fit a gate to whether an answer survives the exit, by cross-entropy.

    Args:
        gate: from `make_gate`.
        features: [Q, 2 * hidden].
        survives: 1 where it does, [Q] int64.
        seed: of the batches' order.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(gate.parameters(), lr=_RATE)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(features), generator=generator).split(_BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(gate(features[rows]), survives[rows]).backward()
            optimiser.step()


@torch.inference_mode()
def fires(gate: nn.Module, features: Tensor) -> NDArray[np.bool_]:
    """Where the gate lets the visual tokens leave, [Q]."""
    decided: NDArray[np.bool_] = gate(features).argmax(-1).bool().numpy()
    return decided


def gated_rows(
    search: Trials,
    confirm: Trials,
    runners: tuple[LocalRunner, LocalRunner],
    costs: Costs,
    exits: Sequence[int],
) -> list[Row]:
    """A gate at each exit: how often it fires on questions that it was not trained on, and what that costs.

    Args:
        search: the questions that the gates are trained on.
        confirm: those they are judged on.
        runners: of the two, for the decoder's hidden states.
        costs: of the prompts of `confirm`.
        exits: the prune layers.
    """
    # out of inference mode, whose tensors nothing can be trained on
    learnt, judged = (runner.text_states(exits).clone() for runner in runners)
    owners = confirm.runner.questions.picture_of
    whole = confirm.right(())
    rows = []
    for at, layer in enumerate(exits):
        leaving = (PruneLayer(layer, 0.0, "vision"),)
        gate = make_gate(learnt.shape[-1] // 2)
        train(gate, learnt[at], torch.from_numpy(_survives(search, leaving)))
        fired = fires(gate, judged[at])
        right = np.where(fired, confirm.right(leaving), whole)
        rows.append(
            {
                "layer": layer,
                "survives": float(_survives(confirm, leaving).mean()),
                "fires": float(fired.mean()),
                "right_of_fired": _mean(_survives(confirm, leaving)[fired]),
                "kv_bytes": _cost(confirm, costs, leaving, fired),
                "accuracy": statistics.share(right, owners).as_dict(),
                "versus": {
                    "unpruned": statistics.difference(right, whole, owners).as_dict(),
                    "always": statistics.difference(right, confirm.right(leaving), owners).as_dict(),
                },
            }
        )
    return rows


def gate_table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    header = ["exit at layer", "answer survives", "gate fires", "right to", "KV bytes", "right"]
    return markdown(
        [*header, "less than unpruned", "over always leaving"],
        [
            [
                str(row["layer"]),
                *(percent(row[name]) for name in ("survives", "fires", "right_of_fired", "kv_bytes")),
                interval(row["accuracy"]),
                *(points(row["versus"][other]) for other in ("unpruned", "always")),
            ]
            for row in rows
        ],
    )


def _survives(trials: Trials, schedule: Sequence[PruneLayer]) -> NDArray[np.int64]:
    """Where the answer is the unpruned one's, [Q]."""
    pairs: Any = zip(
        trials.runner.answer(trials.setting(schedule)), trials.runner.answer(trials.base), strict=True
    )
    return np.array([normalised(a.text) == normalised(b.text) for a, b in pairs], dtype=np.int64)


def _cost(trials: Trials, costs: Costs, schedule: Sequence[PruneLayer], fired: NDArray[np.bool_]) -> float:
    share = trials.cost(schedule, costs).kv_bytes / costs.whole.kv_bytes
    return round(float(np.where(fired, share, 1.0).mean()), 4)


def _mean(values: NDArray[np.int64]) -> float | None:
    return float(values.mean()) if len(values) else None
