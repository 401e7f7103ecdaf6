# SPDX-License-Identifier: Apache-2.0
"""Trains DyVTE's gate (arXiv 2411.19628) and judges it: `vtprune calibrate --gate`.

At a prune layer a small network looks at the prompt's text and says whether all visual tokens may leave there
(`vllm_vtprune.kv_drop.gate`). The paper trains one for every layer, on whether the answer survives; here one
is trained for each exit that is asked about, on the questions that decide, and judged on others. It needs no
engine, since both answers of every question are known: with the exit and without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vllm_vtprune.kv_drop.gate import WIDTH, Gate, GateFacts, leaves, save
from vllm_vtprune.kv_drop.schedule import PruneLayer
from vtprune_calibrate.document import facts_of_run, write
from vtprune_calibrate.run import Calibration, local_runner
from vtprune_calibrate.search import SearchError
from vtprune_calibrate.trials import Costs, Floats, Trials
from vtprune_eval import statistics
from vtprune_eval.tables import Row, interval, markdown, percent, points
from vtprune_eval.transformers_backend import LocalRunner
from vtprune_loadtest.questions import normalised

_EPOCHS, _BATCH, _RATE = 30, 32, 3e-4
#: Trials of a gate: with the exit on both parts of the questions, and a share of the tokens at its cost.
TRIALS = 3


def make_gate(hidden: int, seed: int = 0) -> nn.Sequential:
    """Two linear layers without bias around a GELU, as the paper's.

    Args:
        hidden: width of the decoder; the gate reads twice as much.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2 * hidden, WIDTH, bias=False), nn.GELU(), nn.Linear(WIDTH, 2, bias=False))


def train(network: nn.Sequential, features: Tensor, survives: Tensor, seed: int = 0) -> Gate:
    """Fit a gate to whether an answer survives the exit, by cross-entropy.

    Args:
        network: from `make_gate`; trained in place.
        features: [Q, 2 * hidden].
        survives: 1 where it does, [Q] int64.
        seed: of the batches' order.

    Returns:
        The gate as its file will hold it, in half precision.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE)
    for _ in range(_EPOCHS):
        for rows in torch.randperm(len(features), generator=generator).split(_BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(features[rows]), survives[rows]).backward()
            optimiser.step()
    below, above = (weight.detach().half() for weight in network.parameters())
    return Gate(below, above)


@torch.inference_mode()
def fires(gate: Gate, features: Tensor) -> NDArray[np.bool_]:
    """Where the gate lets the visual tokens leave, [Q]."""
    decided: NDArray[np.bool_] = leaves(gate(features)).numpy()
    return decided


def gated_rows(
    search: Trials,
    confirm: Trials,
    runners: tuple[LocalRunner, LocalRunner],
    costs: Costs,
    exits: Sequence[int],
) -> list[tuple[Row, Gate]]:
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
    found = []
    for at, layer in enumerate(exits):
        leaving = (PruneLayer(layer, 0.0, "vision"),)
        network = make_gate(learnt.shape[-1] // 2)
        gate = train(network, learnt[at], torch.from_numpy(_survives(search, leaving)))
        work = 2 * (gate.below.numel() + gate.above.numel())
        found.append((_judged(confirm, costs, layer, fires(gate, judged[at]), work), gate))
    return found


def _judged(trials: Trials, costs: Costs, layer: int, fired: NDArray[np.bool_], work: int) -> Row:
    """A gate's row, with what its cost would buy otherwise; `work` are its own operations on a prompt.

    `versus` holds the differences to the unpruned model; to always leaving; to a gate that fires as often,
    but by chance (its mean); and to one share of every prompt's visual tokens kept above the same prune
    layer, by their rating, that costs as much.
    """
    owners = trials.runner.questions.picture_of
    leaving = (PruneLayer(layer, 0.0, "vision"),)
    whole, always = trials.right(()), trials.right(leaving)
    survives, rate = _survives(trials, leaving), float(fired.mean())
    right = np.where(fired, always, whole)
    others: dict[str, Floats] = {
        "unpruned": whole,
        "always": always,
        "chance": rate * always + (1 - rate) * whole,
    }
    if 0 < rate < 1:
        # what leaves on average is what would leave of each prompt
        others["share"] = trials.right((PruneLayer(layer, round(1 - rate, 3), "vision"),))
    share = trials.cost(leaving, costs)
    paid = {
        name: 1 - rate * (1 - getattr(share, name) / getattr(costs.whole, name))
        for name in ("flops", "kv_bytes")
    }
    own = work / costs.whole.flops
    paid["flops"] += own
    return {
        "layer": layer,
        "survives": float(survives.mean()),
        "fires": rate,
        "right_of_fired": _mean(survives[fired]),
        **{name: round(cost, 4) for name, cost in paid.items()},
        "own_flops": round(own, 5),
        "accuracy": statistics.share(right, owners).as_dict(),
        "versus": {
            name: statistics.difference(right, other, owners).as_dict() for name, other in others.items()
        },
    }


def gates_of(calibration: Calibration, exits: Sequence[int]) -> list[tuple[Row, Gate]]:
    """`gated_rows` of a calibration on transformers."""
    search, confirm = (local_runner(trials) for trials in (calibration.search, calibration.confirm))
    assert search is not None and confirm is not None
    costs = calibration.costs_held_out
    return gated_rows(calibration.search, calibration.confirm, (search, confirm), costs, exits)


def gate_table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    header = ["exit at layer", "answer survives", "gate fires", "right to", "FLOPs", "KV bytes", "right"]
    others = ("unpruned", "always", "chance", "share")
    return markdown(
        [*header, "less than unpruned", "over always leaving", "over chance", "over a share"],
        [
            [
                str(row["layer"]),
                *(
                    percent(row[name])
                    for name in ("survives", "fires", "right_of_fired", "flops", "kv_bytes")
                ),
                interval(row["accuracy"]),
                *(points(row["versus"].get(other)) for other in others),
            ]
            for row in rows
        ],
    )


def run_gates(calibration: Calibration, exits: Sequence[int], say: Callable[[str], None]) -> list[Path]:
    """Train a gate for each exit, judge and write it; returns the paths.

    Raises:
        SearchError: an exit that is between no layers of the decoder.
    """
    shape, folder = calibration.shape, calibration.folder
    if not 1 <= exits[0] <= exits[-1] < shape.layers:
        raise SearchError(
            f"--gate must be 1 to {shape.layers - 1} for {shape.layers} decoder layers, one or several."
        )
    calibration.bar.expect(2 + TRIALS * len(exits), "gates")
    found = gates_of(calibration, exits)
    calibration.bar.close()
    facts: Any = calibration.facts
    paths = []
    for row, gate in found:
        of = GateFacts(row["layer"], shape.layers, gate.below.shape[1] // 2, facts["model"]["weights"])
        path = folder / f"exit-{row['layer']}.gate"
        save(path, gate, of, {**facts_of_run(facts), "held_out": row})
        paths.append(path)
    rows = [row for row, _ in found]
    say(gate_table(rows))
    return [*paths, write({**facts_of_run(facts), "gates": rows}, folder / "gates.json")]


def _survives(trials: Trials, schedule: Sequence[PruneLayer]) -> NDArray[np.int64]:
    """Where the answer is the unpruned one's, [Q]."""
    pairs: Any = zip(
        trials.runner.answer(trials.setting(schedule)), trials.runner.answer(trials.base), strict=True
    )
    return np.array([normalised(a.text) == normalised(b.text) for a, b in pairs], dtype=np.int64)


def _mean(values: NDArray[np.int64]) -> float | None:
    return float(values.mean()) if len(values) else None
