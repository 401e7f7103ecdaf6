# SPDX-License-Identifier: Apache-2.0
"""What pruning costs in answers, on the demo model's scenes or on your own questions.

    vtprune eval --method inflection,topk,divprune --keep-ratio 0.33,0.22,0.11
    vtprune eval --aggressiveness 0.3,0.5,0.7 --kv-keep 1,0.5 --prune-layer 2 --out results
    vtprune eval --schedule aim pyramid 1:0.8,3:0.3 --out results
    vtprune eval --preset light,balanced,aggressive --server http://localhost:8000
    vtprune eval llava-hf/llava-1.5-7b-hf --questions mine.jsonl --device cuda --dtype float16
    vtprune eval --draw picture.png --aggressiveness 0.5
    vtprune eval --scenes 1000 --write-questions scenes.jsonl
    vtprune eval --study --out docs/evaluation
    vtprune eval llava-hf/llava-1.5-7b-hf --tasks pope,gqa,textvqa --prune-layer 8 --out results

Without MODEL the embedded demo model answers, on transformers. `random`, `uniform` and `downscale` (a smaller
picture) at the same counts, and the agreement with the unpruned answers, stand beside every result. Also
`python -m vtprune_eval` in a checkout. Exit status: 0, or 2 with one sentence where something cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from transformers.utils.logging import disable_progress_bar

from vllm_vtprune import demo_model
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.vision.features import needs_of
from vtprune_eval import published, published_report
from vtprune_eval.arguments import make_parser
from vtprune_eval.backend import Runner, RunnerError
from vtprune_eval.draw import draw_kept
from vtprune_eval.measure import evaluate
from vtprune_eval.options import judge, model_config, settings_of
from vtprune_eval.plots import plot_accuracy, series_by_method
from vtprune_eval.report import dump
from vtprune_eval.scenes import BASE_SIZE
from vtprune_eval.server_backend import RemoteRunner
from vtprune_eval.setting import Setting
from vtprune_eval.study import StudySize, run_study
from vtprune_eval.tables import by_kind, content, summary
from vtprune_eval.tasks import Questions, drawn_questions, file_questions, write_questions
from vtprune_eval.transformers_backend import LocalModel, LocalRunner
from vtprune_loadtest.command import command, make_folder
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.processes import ServerProcess
from vtprune_loadtest.questions import DataError

#: A large checkpoint may have to be fetched first.
_START_SECONDS = 3600


def main(argv: Sequence[str] | None = None, prog: str = "vtprune eval") -> int:
    """Run the command line; gives the exit status."""
    refusals = (LoadTestError, RunnerError, DataError, SettingsError, OSError, ValueError)
    return command(prog, lambda: _run(make_parser(prog, __doc__).parse_args(argv)), refusals)


def _run(options: argparse.Namespace) -> None:
    judge(options)
    disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.out is not None:
        make_folder("--out", options.out)
    if options.draw:
        _draw(options)
    elif options.write_questions is not None:
        _write_questions(options)
    elif options.study:
        _study(options)
    elif options.tasks:
        _published(options)
    else:
        _evaluate(options)


def _evaluate(options: argparse.Namespace) -> None:
    settings = settings_of(options)
    runner = _runner(options, settings)
    document = evaluate(runner, settings, _progress, () if options.no_baselines else None)
    rows = document["rows"]
    print("", *filter(None, (summary(document), by_kind(rows), content(rows))), sep="\n\n")
    if options.out is None:
        return
    path = options.out / "evaluation.json"
    path.write_text(dump(document), encoding="utf-8")
    print(f"wrote {path}")
    try:
        title = f"{document['model']}, {document['questions']['name']}"
        plot = plot_accuracy(
            series_by_method(rows), rows[0]["accuracy"], title, options.out / "evaluation.png"
        )
        print(f"wrote {plot}")
    except ImportError:
        print("No plot: matplotlib is not installed (pip install 'vtprune[bench]').", file=sys.stderr)


def _write_questions(options: argparse.Namespace) -> None:
    size = options.size or model_config(options.model).vision_config.image_size
    questions = drawn_questions(options.split, options.scenes, size, options.domain)
    path = options.write_questions
    make_folder("--write-questions", path.parent)
    write_questions(questions, path)
    print(f"wrote {path}: {len(questions.asked)} questions about {len(questions.pictures)} pictures")


def _study(options: argparse.Namespace) -> None:
    size = StudySize(options.scenes, options.validation_scenes, options.deciding_scenes)
    for path in run_study(_model(options), size, options.out, _progress):
        print(f"wrote {path}")


def _published(options: argparse.Namespace) -> None:
    plan = published.Plan(
        options.server or "",
        options.tasks_python or published.default_python(),
        options.tasks,
        [name for name in options.preset or ["balanced"] if name != "off"],
        options.out,
        options.api_key,
        options.limit,
        options.tasks_include,
        options.concurrency,
    )
    published.judge(plan)
    with contextlib.ExitStack() as stack:
        if not options.server:
            server = _start_server(options)
            stack.callback(server.stop)
            plan = replace(plan, server=server.url)
        document = published.run_tasks(plan, _progress)
    for path, text in (
        (options.out / "tasks.json", json.dumps(document, indent=1)),
        (options.out / "tasks.md", published_report.page(document)),
    ):
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    try:
        print(f"wrote {published_report.plot(document, options.out / 'tasks.png')}")
    except ImportError:
        print("No plot: matplotlib is not installed (pip install 'vtprune[bench]').", file=sys.stderr)


def _start_server(options: argparse.Namespace) -> ServerProcess:
    """`vtprune serve` for MODEL, on a free port."""
    layers = ["--prune-layer", ",".join(map(str, options.prune_layer))] if options.prune_layer else []
    model = [options.model] if options.model else []
    command = [sys.executable, "-m", "vtprune_server.cli", "serve", *model, *layers]
    _progress("starting the server")
    return ServerProcess.start(command, options.out / "server.log", os.environ, within_s=_START_SECONDS)


def _draw(options: argparse.Namespace) -> None:
    model, folder = _model(options), options.out or Path()
    for setting in settings_of(options):
        for source in options.draw:
            with Image.open(source) as image:
                amount = setting.label.replace(" ", "_").replace("=", "")
                print(draw_kept(model, image, setting, folder / f"{source.stem}-{amount}.png"))


def _runner(options: argparse.Namespace, settings: list[Setting]) -> Runner:
    if options.server:
        return RemoteRunner(
            options.server,
            _questions(options, options.size or BASE_SIZE),
            model=options.model,
            api_key=options.api_key,
            concurrency=options.concurrency,
            limit=options.max_tokens,
        )
    outputs = needs_of([setting.counted for setting in settings])
    config = model_config(options.model)
    questions = _questions(options, config.vision_config.image_size)  # a bad file is told before models load
    return LocalRunner(_model(options), questions, outputs, options.max_tokens)


def _model(options: argparse.Namespace) -> LocalModel:
    return LocalModel(options.model or str(demo_model.FOLDER), options.device, getattr(torch, options.dtype))


def _questions(options: argparse.Namespace, size: int) -> Questions:
    if options.questions is not None:
        return file_questions(options.questions, options.suffix)
    return drawn_questions(options.split, options.scenes, size, options.domain)


def _progress(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
