# SPDX-License-Identifier: Apache-2.0
"""Published benchmarks through lmms-eval: `vtprune eval MODEL --tasks pope,gqa,textvqa --out FOLDER`.

lmms-eval runs in an environment of its own against a vtprune server, once for each arm and task: unpruned,
each preset, and beside each preset `random` at the same counts of every picture and, where the tower takes
pictures of any size, the picture itself made smaller to as many tokens on average (arXiv 2510.07143). A run
that is done is kept under the output folder and not repeated.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from vllm_vtprune.contract import HEADERS
from vtprune_eval.arm_proxy import arm_proxy
from vtprune_eval.backend import RunnerError
from vtprune_eval.tables import percent

#: The release whose options and files this module knows.
LMMS_EVAL = "lmms-eval==0.7.3"
#: The arms' names, or their ends.
OFF, RANDOM, DOWNSCALE = "off", "random", "downscale"
_DONE = "done.json"
_FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec('lmms_eval') is None)"
_LOG_TAIL = 2000


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        server: base URL of a vtprune server.
        python: interpreter of the environment that has lmms-eval.
        tasks: lmms-eval's names.
        presets: the arms beside `off`.
        folder: for results; what is done there is not run again.
        api_key: the server's.
        limit: questions of each task; None for all.
        include: a folder with tasks of one's own, in lmms-eval's format.
        concurrency: requests in flight.
    """

    server: str
    python: Path
    tasks: Sequence[str]
    presets: Sequence[str]
    folder: Path
    api_key: str | None = None
    limit: int | None = None
    include: Path | None = None
    concurrency: int = 8


@dataclass(frozen=True)
class Arm:
    """One way to serve the same questions.

    Attributes:
        name: in reports and folders.
        headers: of its requests.
        pixels: share of each picture's pixels.
    """

    name: str
    headers: tuple[tuple[str, str], ...]
    pixels: float = 1.0


def default_python() -> Path:
    """Where `make tasks-env` installs lmms-eval: ~/.cache/vtprune/clients/lmms-eval."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vtprune" / "clients" / "lmms-eval" / "bin" / "python"


def judge(plan: Plan) -> None:
    """Refuse what cannot run, before anything long starts.

    Raises:
        RunnerError: no lmms-eval, or a folder of tasks that is not there.
    """
    found = (
        plan.python.is_file()
        and not subprocess.run(
            [
                plan.python,
                "-c",
                "import importlib.util, sys; sys.exit(not importlib.util.find_spec('lmms_eval'))",
            ],
            check=False,
        ).returncode
    )
    if not found:
        raise RunnerError(
            f"{plan.python} has no lmms-eval, which --tasks runs: make an environment for it (`make "
            f"tasks-env`, or `python -m venv DIR && DIR/bin/pip install {LMMS_EVAL} 'filelock<4'`) and name "
            "its interpreter with --tasks-python DIR/bin/python."
        )
    if plan.include is not None and not plan.include.is_dir():
        raise RunnerError(f"--tasks-include names {plan.include}, which is no folder.")


def run_tasks(plan: Plan, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not done yet, and gather everything.

    Returns:
        A JSON object: `model`, `server`, `limit`, `notes`, and `rows`, one for each arm and task.

    Raises:
        RunnerError: the server is not vtprune's, or lmms-eval failed; the end of its log is in the message.
    """
    config = _server_config(plan)
    model = config["model"]["id"]
    any_size = config["model"]["vision_tokens_per_image"] is None
    notes = (
        []
        if any_size
        else [
            "No downscale arm: this model's tower resizes every picture to one size, so a smaller picture "
            "has as many tokens. `vtprune eval MODEL --method downscale` shrinks pictures inside such a "
            "tower, on transformers."
        ]
    )
    rows: list[dict[str, Any]] = []
    for task in plan.tasks:
        kept: dict[str, float] = {}
        for arm in _arms(plan.presets, any_size, kept):
            done = _run(plan, model, arm, task, progress)
            kept[arm.name] = done["share_kept"]
            rows.append({"task": task, "arm": arm.name, **done})
    notes += [
        f"{row['arm']}, {row['task']}: {row['traffic']['refused']} requests were refused and count as wrong "
        f"answers, the first with {row['traffic']['errors'][:1]}."
        for row in rows
        if row["traffic"]["refused"]
    ]
    return {"model": model, "limit": plan.limit, "versions": config["versions"], "notes": notes, "rows": rows}


def _arms(presets: Sequence[str], any_size: bool, kept: dict[str, float]) -> Iterator[Arm]:
    """The arms in order; `kept` has each earlier arm's share of the tokens by the time that it counts."""
    preset, method = HEADERS["preset"], HEADERS["method"]
    yield Arm(OFF, ((preset, "off"),))
    for name in presets:
        yield Arm(name, ((preset, name),))
        yield Arm(f"{name}-{RANDOM}", ((preset, name), (method, RANDOM)))
        # nothing pruned has no smaller picture
        if any_size and 0 < kept[name] < 1:
            yield Arm(f"{name}-{DOWNSCALE}", ((preset, "off"),), kept[name])


def _run(plan: Plan, model: str, arm: Arm, task: str, progress: Callable[[str], None]) -> dict[str, Any]:
    folder = plan.folder / task / arm.name
    asked = {"arm": [arm.name, list(map(list, arm.headers)), round(arm.pixels, 6)], "limit": plan.limit}
    asked |= {"model": model, "task": task}
    done = folder / _DONE
    if done.is_file():
        before: dict[str, Any] = json.loads(done.read_text())
        if before.pop("asked") == asked:
            progress(f"{task}, {arm.name}: done before")
            return before
    folder.mkdir(parents=True, exist_ok=True)
    progress(f"{task}, {arm.name}: running")
    with arm_proxy(plan.server, dict(arm.headers), arm.pixels, plan.api_key) as (url, traffic):
        _lmms_eval(plan, url, model, task, folder)
    if not traffic.answered:
        raise RunnerError(
            f"lmms-eval's {task} got no answer from the server for the arm {arm.name}: {traffic.errors[:1]}"
        )
    total = traffic.vision_tokens
    result = {
        "metrics": _metrics(folder, task),
        "share_kept": traffic.vision_tokens_kept / total if total else 1.0,
        "traffic": asdict(traffic),
    }
    done.write_text(json.dumps({"asked": asked, **result}, indent=1))
    shown = ", ".join(f"{name} {value['value']:.4g}" for name, value in result["metrics"].items())
    progress(f"{task}, {arm.name}: {shown}; {percent(result['share_kept'])} of the vision tokens kept")
    return result


def _lmms_eval(plan: Plan, url: str, model: str, task: str, folder: Path) -> None:
    for stale in folder.rglob("*results.json"):
        stale.unlink()
    command = [
        plan.python,
        "-m",
        "lmms_eval",
        "--model",
        "async_openai",
        "--tasks",
        task,
        "--batch_size",
        "1",
    ]
    command += ["--model_args", f"model_version={model},base_url={url}/v1,num_cpus={plan.concurrency}"]
    command += ["--log_samples", "--output_path", str(folder)]
    command += ["--limit", str(plan.limit)] if plan.limit is not None else []
    command += ["--include_path", str(plan.include)] if plan.include is not None else []
    # its modules lie in its own environment alone, and the proxy is on this machine
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LD_PRELOAD", "VLLM_PLUGINS")}
    environment = {**kept, "OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    log = folder / "lmms-eval.log"
    with log.open("wb") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False)
    # it reports some failures and ends with status 0
    if done.returncode or not list(folder.rglob("*results.json")):
        tail = log.read_text(errors="replace")[-_LOG_TAIL:]
        raise RunnerError(f"lmms-eval failed on {task}; its log {log} ends with:\n{tail}")


def _metrics(folder: Path, task: str) -> dict[str, dict[str, float | None]]:
    """Metric -> its value and standard error, of the newest results file; a group's tasks side by side."""
    newest = max(folder.rglob("*results.json"), key=lambda path: path.stat().st_mtime)
    results: dict[str, dict[str, Any]] = json.loads(newest.read_text())["results"]
    found: dict[str, dict[str, float | None]] = {}
    for name, entries in results.items():
        for key, value in entries.items():
            metric, _, rule = key.partition(",")
            if not isinstance(value, int | float) or not rule or "_stderr" in metric:
                continue
            error = entries.get(f"{metric}_stderr,{rule}")
            label = metric if name == task else f"{name} {metric}"
            found[label] = {"value": value, "error": error if isinstance(error, int | float) else None}
    if not found:
        raise RunnerError(f"lmms-eval wrote no number for {task} into {newest}.")
    return found


def _server_config(plan: Plan) -> dict[str, Any]:
    key = {"Authorization": f"Bearer {plan.api_key}"} if plan.api_key else {}
    try:
        response = httpx.get(f"{plan.server.rstrip('/')}/vtprune/config", headers=key, timeout=60)
        response.raise_for_status()
        config: dict[str, Any] = response.json()
        return {"model": config["model"], "versions": config["versions"]}
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise RunnerError(
            f"{plan.server} does not show a vtprune server's configuration ({error}): start `vtprune serve`, "
            "and give its key with --api-key or in $OPENAI_API_KEY."
        ) from None
