# SPDX-License-Identifier: Apache-2.0
"""Which scenario of stage 2 runs on which model runner, their runs, and what came out.

`make test` runs the pairs below. `python -m tests.soak_kv --runner RUNNER` sets VTPRUNE_TEST_ALL_ON=RUNNER:
then every scenario runs on that runner.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import random_llava
from tests.helpers.engine_process import saved_by
from tests.helpers.kv_cases import (
    BANDS,
    GATE_AT,
    TURNS,
    alone,
    band_cases,
    band_crowd,
    brief_crowd,
    corners,
    crowd,
    gate_cases,
    gate_crowd,
    grid,
    replayed,
    resettable,
    talks,
    texts,
    unpruned,
)
from tests.helpers.kv_gate import FILE, write_gate
from tests.helpers.model_runner_v2 import RUNNERS, environment
from tests.reference import Answer, PruneLayer, Reference, Request
from vllm_vtprune.kv_drop.schedule import parse

#: Asks for every scenario on one runner.
VARIABLE = "VTPRUNE_TEST_ALL_ON"
_ALL_ON = os.environ.get(VARIABLE)
_IN_CI: dict[str, tuple[str, ...]] = {
    "grid": RUNNERS,
    "top": ("v1", "v2"),
    "tensor_parallel": ("v1", "v2"),
    "preemption": ("v1",),
    "capacity": ("v1",),
    "text_only": ("v2",),
    "no_layer": ("v1",),
    "plain": ("v1",),
    "bands": ("v1", "v2"),
    "bands_preemption": ("v1", "v2-async"),
    "bands_compiled": ("v1", "v2"),
    "turns": ("v1", "v2-async"),
}
#: Scenario -> the checkpoint of `checkpoints` it runs on; `grouped` for the others.
CHECKPOINT = {"top": "ungrouped", "bands": "qwen3", "bands_preemption": "mistral", "bands_compiled": "qwen2"}
#: Scenario of `tests.helpers.kv_run` -> runners.
ON = {name: (_ALL_ON,) if _ALL_ON else runners for name, runners in _IN_CI.items()}
#: What is compared with the reference: the scenario it is a part of, and how many answers that are.
COMPARED: dict[str, tuple[str, int]] = {
    "grid": ("grid", len(grid())),
    "one at a time": ("grid", len(alone())),
    "aborted while preempted": ("grid", len(brief_crowd()) - 1),
    "reset while running": ("grid", len(resettable())),
    "reset, then abort": ("grid", len(resettable()) - 1),
    "dummy runs between": ("grid", len(resettable())),
    "asleep": ("grid", 2 * len(unpruned()[:2])),
    "a disagreement beside them": ("grid", len(resettable()) - 2),
    "full graphs": ("grid", len(replayed())),
    "top": ("top", len(grid())),
    "tensor_parallel": ("tensor_parallel", len(corners())),
    "preemption": ("preemption", len(crowd())),
    "capacity": ("capacity", sum(len(request.images) == 1 for request in corners())),
    "text only": ("text_only", len(texts())),
    "bands": ("bands", len(band_cases())),
    "bands, one at a time": ("bands", len(band_cases()[:6])),
    "bands_preemption": ("bands_preemption", len(band_crowd())),
    "bands_compiled": ("bands_compiled", len(band_cases())),
    "piecewise graphs": ("bands_compiled", len(band_cases())),
    "a gate": ("bands", len(gate_cases())),
    "a gate, alone": ("bands", len(gate_cases()[:4])),
    "a gate, tensor parallel": ("tensor_parallel", len(gate_cases())),
    "a gate, preempted": ("bands_preemption", len(gate_crowd())),
    "a gate, reset": ("bands_preemption", len(gate_crowd())),
    "a gate, compiled": ("bands_compiled", len(gate_cases())),
    "three turns": ("turns", 3 * len(talks())),
    "a third turn with an empty cache": ("turns", len(talks())),
    "a third turn, twice": ("turns", len(talks())),
    "turns that do not go on": ("turns", 6),
    "turns, reset": ("turns", 6),
    "turns, preempted and aborted": ("turns", 8),
}
#: Acted out for the V2 runner.
_GRAPHS = ("full graphs", "piecewise graphs")


def compared_table() -> str:
    """Scenarios x runners with the number of answers that `make test` compares, for docs/architecture.md."""
    rows = []
    for name, (scenario, count) in COMPARED.items():
        runners = [r for r in _IN_CI[scenario] if name not in _GRAPHS or r.startswith("v2")]
        cells = (str(count) if runner in runners else "" for runner in RUNNERS)
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    head = f"| scenario | {' | '.join(RUNNERS)} |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def band_layers(scenario: str) -> tuple[tuple[PruneLayer, ...], tuple[str, ...]]:
    """Prune layers and ratings of a scenario with several, as the reference takes them."""
    options = {**BANDS, "turns": TURNS}[scenario]
    prune_layers = tuple((p.layer, p.share, p.of) for p in parse(options["prune_layers"]))
    return prune_layers, tuple(options["relevance"].split(","))


class Runs:
    """Runs scenarios, each once, in a process of its own: `runs(SCENARIO, RUNNER)`.

    Two run at a time, or one where pytest's workers share the cores.
    """

    def __init__(self, folder: Path, checkpoints: dict[str, Path]) -> None:
        self._folder, self._checkpoints = folder, checkpoints
        self._pool = ThreadPoolExecutor(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
        self._running: dict[tuple[str, str], Future[dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def __call__(self, scenario: str, runner: str) -> dict[str, Any]:
        """What the scenario saw."""
        return self.start(scenario, runner).result()

    def start(self, scenario: str, runner: str) -> Future[dict[str, Any]]:
        """Have it run, if it does not yet."""
        with self._lock:
            key = scenario, runner
            if key not in self._running:
                self._running[key] = self._pool.submit(self._run, scenario, runner)
            return self._running[key]

    def close(self) -> None:
        """Wait for what runs and start nothing more."""
        self._pool.shutdown(cancel_futures=True)

    def _run(self, scenario: str, runner: str) -> dict[str, Any]:
        out = self._folder / f"{scenario}-{runner}.pt"
        checkpoint = self._checkpoints[CHECKPOINT.get(scenario, "grouped")]
        return saved_by(
            "tests.helpers.kv_run",
            *(scenario, str(checkpoint), str(out)),
            out=out,
            env={**environment(runner), "VLLM_PLUGINS": "" if scenario == "plain" else "vtprune"},
            timeout=1700,
        )


class Verdicts:
    """The reference's word on answers, asked once for equal ones, and how many were compared.

    Attributes:
        counts: answers found equal, by scenario and runner.
    """

    def __init__(self, checkpoints: dict[str, Path]) -> None:
        self._references = {name: Reference(folder) for name, folder in checkpoints.items()}
        self._folders = checkpoints
        self._judged: dict[Any, Answer] = {}
        self.counts: Counter[tuple[str, str]] = Counter()

    def reference(
        self,
        layer: int | tuple[PruneLayer, ...],
        relevance: str | tuple[str, ...] = "attention",
        checkpoint: str = "grouped",
        gate: bool = False,
        block: int = 1,
    ) -> Reference:
        """The reference with this prune layer, or these, and the checkpoint's gate."""
        reference = self._references[checkpoint]
        reference.block = block
        reference.gate = self._folders[checkpoint] / FILE if gate else None
        reference.prune_layer, reference.relevance = layer, relevance
        return reference

    def check(
        self,
        scenario: str,
        runner: str,
        layer: int | tuple[PruneLayer, ...],
        requests: Sequence[Request],
        answers: Sequence[dict[str, Any] | None],
        relevance: str | tuple[str, ...] = "attention",
        checkpoint: str = "grouped",
        gate: bool = False,
        block: int = 1,
    ) -> None:
        """Same prompt, same greedy tokens, log-probabilities within 1e-4; None is a request that got none.

        With a gate, the same decision too.
        """
        reference = self.reference(layer, relevance, checkpoint, gate, block)
        assert sum(mine is not None for mine in answers) == COMPARED[scenario][1]
        for number, (request, mine) in enumerate(zip(requests, answers, strict=True)):
            if mine is None:
                continue
            key = (scenario, number, layer, relevance, checkpoint, tuple(mine["tokens"]))
            if key not in self._judged:
                self._judged[key] = reference.judge(request, mine["tokens"])
            theirs = self._judged[key]
            assert mine["prompt_tokens"] == len(theirs.prompt_ids)
            assert mine["tokens"] == theirs.token_ids, request
            assert mine["logprobs"] == pytest.approx(theirs.logprobs, abs=1e-4), request
            assert mine["gate"] is theirs.left, request
            self.counts[scenario, runner] += 1

    def table(self) -> list[str]:
        """Answers that equalled the reference: a line per scenario, a column per runner."""
        runners = [r for r in RUNNERS if any(r == runner for _, runner in self.counts)]
        scenarios = dict.fromkeys(scenario for scenario, _ in self.counts)
        lines = [f"{'answers equal to the reference':32}" + "".join(f"{r:>10}" for r in runners)]
        for scenario in scenarios:
            cells = (self.counts[scenario, runner] or "-" for runner in runners)
            lines.append(f"{scenario:32}" + "".join(f"{cell:>10}" for cell in cells))
        return lines


def checkpoints(folder: Callable[[str], Path]) -> dict[str, Path]:
    """Llamas with grouped-query attention and, as LLaVA-1.5, without; then the other decoders.

    Their weights are large enough that attention is not uniform.
    """
    made = {}
    for seed, (name, decoder, kv_heads) in enumerate(
        [
            ("grouped", "llama", 2),
            ("ungrouped", "llama", 4),
            ("mistral", "mistral", 2),
            ("qwen2", "qwen2", 2),
            ("qwen3", "qwen3", 2),
        ],
        start=3,
    ):
        made[name] = random_llava(
            folder(name),
            decoder=decoder,
            layers=6,
            heads=4,
            kv_heads=kv_heads,
            weight_scale=5.0,
            seed=seed,
        )
    for scenario, layer in GATE_AT.items():
        several = scenario in BANDS
        prune_layers, relevance = band_layers(scenario) if several else (2, "attention")
        crowd = gate_crowd() if scenario == "bands_preemption" else gate_cases()[:8]
        folder_of = made[CHECKPOINT.get(scenario, "grouped")]
        write_gate(folder_of, prune_layers, relevance, layer, [r for r in crowd if first_share(r) < 1])
    return made


def first_share(request: Request) -> float:
    """What a request keeps above the first prune layer."""
    return request.kv_keep[0] if isinstance(request.kv_keep, tuple) else request.kv_keep
