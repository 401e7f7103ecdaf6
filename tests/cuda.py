# SPDX-License-Identifier: Apache-2.0
"""Stage 2 on a GPU beside the reference: vLLM's CUDA build, both model runners, CUDA graphs.

    python -m tests.cuda                # everything, as many engines at once as there is room for
    python -m tests.cuda cuda-v2 --out FOLDER

Answers are compared in float32, which on CUDA only the Triton attention backend takes, with its products in
full float32 (TRITON_F32_DEFAULT=ieee). The reference runs on the CPU. An answer that differs where the
reference itself is within rounding of another is counted as a tie. Exits 1 if anything differs or fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tests.conftest import REPOSITORY
from tests.helpers import family_stage2
from tests.helpers.family_checkpoints import CHECKPOINTS
from tests.helpers.kv_cases import (
    alone,
    band_cases,
    band_crowd,
    brief_crowd,
    crowd,
    gate_cases,
    gate_crowd,
    grid,
    resettable,
    unpruned,
)
from tests.helpers.kv_engine import DEVICE
from tests.helpers.kv_gate import FILE
from tests.helpers.kv_matrix import CHECKPOINT, band_layers, checkpoints
from tests.reference import Reference, Request

TOLERANCE = 1e-4
#: What runs: scenario of `tests.helpers.kv_run`, or family of `family_checkpoints`, and model runner.
JOBS = (
    ("cuda", "v2"),
    ("cuda", "v1"),
    ("bands", "v2"),
    ("bands_preemption", "v2"),
    ("bands_compiled", "v2"),
    ("top", "v2"),
    ("preemption", "v2"),
    ("qwen2_5_vl", "v2"),
    ("qwen3_vl", "v2"),
)
Answers = Sequence[dict[str, Any] | None]


class Judge:
    """Compares answers with the reference's and counts: equal, ties, different."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self._folders = folders
        self.differences: list[str] = []

    def stage_2(
        self,
        scenario: str,
        requests: Sequence[Request],
        answers: Answers,
        layers: Any,
        relevance: Any,
        *,
        gate: bool = False,
    ) -> Counter[str]:
        folder = self._folders[CHECKPOINT.get(scenario, "grouped")]
        reference = Reference(folder, layers, relevance=relevance, gate=folder / FILE if gate else None)
        counts: Counter[str] = Counter()
        for request, mine in zip(requests, answers, strict=True):
            if mine is None:
                continue
            theirs = reference.judge(request, mine["tokens"])
            word = _verdict(mine, theirs.token_ids, theirs.logprobs)
            if word == "different" and reference.is_tie(request, mine["tokens"], TOLERANCE):
                word = "ties"
            self._count(counts, word, scenario, request, mine, theirs)
        return counts

    def family(self, name: str, answers: Answers) -> Counter[str]:
        oracle = family_stage2.BothStagesOracle(self._folders[name])
        counts: Counter[str] = Counter()
        asked = family_stage2.cases(oracle.family.prunes_videos)
        for request, mine in zip(asked, answers, strict=True):
            assert mine is not None
            theirs = oracle.judge(request, mine["tokens"])
            self._count(
                counts, _verdict(mine, theirs.token_ids, theirs.logprobs), name, request, mine, theirs
            )
        return counts

    def _count(self, counts: Counter[str], word: str, *what: Any) -> None:
        counts[word] += 1
        if word == "different":
            self.differences.append("\n".join(map(str, what)))


def _verdict(mine: dict[str, Any], tokens: list[int], logprobs: list[float]) -> str:
    close = all(abs(a - b) < TOLERANCE for a, b in zip(mine["logprobs"], logprobs, strict=True))
    return "equal" if mine["tokens"] == tokens and close else "different"


def run(scenario: str, runner: str, folder: Path, out: Path) -> dict[str, Any]:
    """One engine in a process of its own; what it saw.

    Raises:
        RuntimeError: it failed; the end of what it printed.
    """
    module = "family_stage2" if scenario in CHECKPOINTS else "kv_run"
    command = [sys.executable, "-m", f"tests.helpers.{module}"]
    command += [str(folder), str(out)] if scenario in CHECKPOINTS else [scenario, str(folder), str(out)]
    env = {
        **os.environ,
        DEVICE: "cuda",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "v2")),
        "TRITON_F32_DEFAULT": "ieee",
        "VLLM_PLUGINS": "vtprune",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "OMP_NUM_THREADS": "2",
    }
    log = out.with_suffix(".log")
    with log.open("wb") as stream:
        status = subprocess.run(command, env=env, cwd=REPOSITORY, stdout=stream, stderr=stream).returncode
    if status:
        raise RuntimeError(log.read_text(errors="replace")[-3000:])
    result: dict[str, Any] = torch.load(out, weights_only=False)
    return result


def judged(judge: Judge, scenario: str, found: dict[str, Any]) -> dict[str, Counter[str]]:
    """Verdicts by part of what a job saw."""
    if scenario in CHECKPOINTS:
        return {scenario: judge.family(scenario, found["answers"])}
    if scenario == "cuda":
        parts: dict[str, tuple[Sequence[Request], Callable[[], Answers]]] = {
            "mixed batch": (grid(), lambda: found["batch"]),
            "one at a time": (alone(), lambda: found["single"]),
            "unpruned": (unpruned(), lambda: found["unpruned"]),
            "preempted, aborted": (brief_crowd(), lambda: found["crowd"]["answers"]),
            "reset while running": (resettable(), lambda: found["reset"]["answers"]),
            "reset, then abort": (resettable(), lambda: found["reset_abort"]["answers"]),
            "dummy runs between": (resettable(), lambda: found["dummy_runs"]["answers"]),
        }
        verdicts = {}
        for name, (requests, answers) in parts.items():
            try:
                verdicts[name] = judge.stage_2(scenario, requests, answers(), 2, "attention")
            except KeyError:
                verdicts[name] = Counter(failed=1)
        judge.differences += [f"{name}: {text}" for name, text in found["errors"].items()]
        return verdicts
    requests, layers, relevance = {
        "bands": (band_cases(), *band_layers("bands")),
        "bands_preemption": (band_crowd(), *band_layers("bands_preemption")),
        "bands_compiled": (band_cases(), *band_layers("bands_compiled")),
        "top": (grid(), 5, "attention"),
        "preemption": (crowd(), 1, "last_token"),
    }[scenario]
    answers = found.get("answers", found.get("batch"))
    verdicts = {scenario: judge.stage_2(scenario, requests, answers, layers, relevance)}
    if "gated" in found:
        gated = gate_crowd() if scenario == "bands_preemption" else gate_cases()
        verdicts[f"{scenario}, a gate"] = judge.stage_2(
            scenario, gated, found["gated"], layers, relevance, gate=True
        )
    return verdicts


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = [f"{scenario}-{runner}" for scenario, runner in JOBS]
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="keep what the engines saw, and their logs")
    parser.add_argument("--at-once", type=int, default=5, help="engines at once; default: %(default)s")
    options = parser.parse_args()
    if wrong := set(options.jobs) - set(names):
        parser.error(f"there is no job {', '.join(wrong)}")
    if not torch.cuda.is_available():
        parser.error("there is no GPU: `make test` runs the same on the CPU")
    out = options.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp())
    jobs = [job for job, name in zip(JOBS, names, strict=True) if not options.jobs or name in options.jobs]
    folders = checkpoints(lambda name: scratch / name)
    folders |= {name: CHECKPOINTS[name](scratch / name) for name, _ in jobs if name in CHECKPOINTS}
    judge, failed, start = Judge(folders), 0, time.monotonic()

    def job(scenario: str, runner: str) -> None:
        nonlocal failed
        folder = folders.get(scenario) or folders[CHECKPOINT.get(scenario, "grouped")]
        try:
            found = run(scenario, runner, folder, out / f"{scenario}-{runner}.pt")
            verdicts = judged(judge, scenario, found)
            about = {
                k: found[k]
                for k in ("v2", "graphs", "running", "blocks_lost", "preemptions", "bands")
                if k in found
            }
            about |= {k: found["pool"][k] for k in ("before", "during", "after") if "pool" in found}
        except Exception as error:
            failed += 1
            print(f"{scenario}-{runner}: FAILED after {time.monotonic() - start:.0f} s\n{error}", flush=True)
            return
        for part, counts in verdicts.items():
            failed += bool(counts["different"] or counts["failed"])
            print(f"{scenario}-{runner:3} {part:24}", dict(counts), flush=True)
        print(f"{scenario}-{runner}: {about}, {time.monotonic() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda pair: job(*pair), jobs))
    for text in judge.differences[:5]:
        print("DIFFERENT", text[:2500])
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
