# SPDX-License-Identifier: Apache-2.0
"""Soak of stage 2: random settings, lengths, aborts and preemptions on a small model, every answer checked.

    python -m tests.soak_kv --minutes 10
    python -m tests.soak_kv --runner v2

With a runner (`v1`, `v1-async`, `v2` or `v2-async`: vLLM's Model Runner V1 or V2, `async` with a scheduler
that runs a step ahead) every scenario of `tests/kv_drop/test_equality.py` runs on it first, those that
`make test` leaves out among them.

Prints a line every half minute and a summary; exits 1 if an answer differs from the reference's, a block is
lost or nothing was preempted. An answer that differs where the reference itself is within rounding of another
(two tokens equally likely, or two prompt tokens equally relevant at the cut) is counted as a tie.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import REPOSITORY
from tests.helpers.checkpoints import random_llava
from tests.helpers.kv_matrix import VARIABLE
from tests.helpers.model_runner_v2 import RUNNERS, environment
from tests.helpers.pictures import noise
from tests.reference import Reference, Request

PRUNE_LAYER = 2
TOLERANCE = 1e-4
_STARTED = "VTPRUNE_TEST_SOAK"
WORDS = ("what", "color", "is", "the", "circle", "and", "where", "</s>", "please", "<pad>", "tell")


def random_request(dice: random.Random) -> Request:
    """Any mix of what a request may ask for."""
    images = dice.choice([0, 1, 1, 1, 2])
    text = " ".join(dice.choices(WORDS, k=dice.randint(2, 40)))
    stage_1: dict[str, Any] = dice.choice([{}, {"aggressiveness": 0.5}, {"keep_ratio": 0.3}])
    return Request(
        "<s>" + "<image>\n" * images + text,
        tuple(noise(dice.randrange(12)) for _ in range(images)),
        kv_keep=dice.choice([1.0, 0.75, 0.5, 0.25, 0.1, round(dice.uniform(0.01, 1), 3)]),
        kv_scope=dice.choice(["all", "vision"]),
        max_tokens=dice.randint(1, 60),
        **stage_1,
    )


@dataclass
class Soak:
    """One run: an engine, the reference, and what was counted."""

    engine: Any
    reference: Reference
    dice: random.Random
    counts: Counter[str]

    def batch(self, number: int) -> None:
        """Up to 16 requests arriving over a few steps, some aborted, the others checked."""
        asked = {f"{number}-{i}": random_request(self.dice) for i in range(self.dice.randint(1, 16))}
        waiting = list(asked)
        aborted = {i for i in asked if self.dice.random() < 0.15}
        outputs: dict[str, Any] = {}
        llm = self.engine.llm.llm_engine
        while waiting or llm.has_unfinished_requests():
            for _ in range(self.dice.randint(0, 4)):
                if waiting:
                    request_id = waiting.pop()
                    self.engine.add(asked[request_id], request_id)
            for output in llm.step():
                if output.finished:
                    outputs[output.request_id] = output
            for request_id in list(aborted):
                if request_id not in waiting and self.dice.random() < 0.2:
                    llm.abort_request([request_id])
                    aborted.discard(request_id)
                    self.counts["aborted"] += request_id not in outputs
        for request_id, output in outputs.items():
            self.check(asked[request_id], output)

    def check(self, request: Request, output: Any) -> None:
        """Compare one answer with the reference's."""
        from tests.helpers.kv_engine import answer

        if output.outputs[0].finish_reason == "abort":
            return
        mine = answer(output)
        theirs = self.reference.judge(request, mine["tokens"])
        close = all(abs(a - b) < TOLERANCE for a, b in zip(mine["logprobs"], theirs.logprobs, strict=True))
        if mine["tokens"] == theirs.token_ids and close:
            self.counts["equal"] += 1
        elif self.reference.is_tie(request, mine["tokens"], TOLERANCE):
            self.counts["ties"] += 1
        else:
            self.counts["different"] += 1
            print("DIFFERENT", request, mine, theirs, flush=True)


def scenarios(runner: str) -> int:
    """Every scenario of the equality tests on one runner; pytest's exit status."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/kv_drop/test_equality.py"]
    return subprocess.run(command, cwd=REPOSITORY, env={**os.environ, VARIABLE: runner}).returncode


def _start_again(runner: str) -> None:
    """Replace this process by one whose environment is the engine's: Triton reads it when it is imported."""
    engine = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        **os.environ,
        **environment(runner),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        _STARTED: "1",
    }
    os.execve(sys.executable, [sys.executable, "-m", "tests.soak_kv", *sys.argv[1:]], engine)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runner", choices=RUNNERS, help="run all scenarios on it, then the soak")
    options = parser.parse_args()
    if _STARTED not in os.environ:
        if options.runner and scenarios(options.runner):
            return 1
        _start_again(options.runner or "v1")
    from tests.helpers.kv_engine import Engine

    folder = random_llava(Path(tempfile.mkdtemp()), layers=6, heads=4, kv_heads=2, weight_scale=5.0, seed=3)
    engine = Engine(
        str(folder),
        prune_layer=PRUNE_LAYER,
        block_size=32,
        num_gpu_blocks_override=90,
        max_model_len=640,
        max_num_batched_tokens=700,
    )
    free = engine.pool.get_num_free_blocks()
    soak = Soak(engine, Reference(folder, PRUNE_LAYER), random.Random(options.seed), Counter())
    end = time.monotonic() + 60 * options.minutes
    printed = number = 0
    while time.monotonic() < end:
        soak.batch(number)
        number += 1
        if time.monotonic() > end - 60 * options.minutes + 30 * (printed + 1):
            printed += 1
            print(summary(soak, engine, free), flush=True)
    print("END", summary(soak, engine, free))
    lost = free - engine.pool.get_num_free_blocks() + len(engine.scheduler.prompt_plans)
    return int(bool(lost or soak.counts["different"] or not engine.metric("vllm:num_preemptions")))


def summary(soak: Soak, engine: Any, free: int) -> str:
    """Counts so far."""
    preempted = int(engine.metric("vllm:num_preemptions"))
    counts = ", ".join(f"{soak.counts[name]} {name}" for name in ("equal", "ties", "different", "aborted"))
    blocks = f"{engine.pool.get_num_free_blocks()} of {free} blocks free"
    return f"{counts}, {preempted} preempted, {blocks}, {len(engine.scheduler.prompt_plans)} plans left"


if __name__ == "__main__":
    sys.exit(main())
