# SPDX-License-Identifier: Apache-2.0
"""Finds the prune schedule, and the presets, for a model and its pictures.

    vtprune calibrate --tolerance 0.01 --out calibration
    vtprune calibrate --budget flops=0.5 --bands 2 --out calibration
    vtprune calibrate llava-hf/llava-1.5-7b-hf --questions mine.jsonl --budget kv=0.4 --device cuda --out 7b
    vtprune serve MODEL --prune-layers 7:vision=1,14:vision=1,21:vision=1
    vtprune calibrate --server http://localhost:8000 --tolerance 0.01 --questions mine.jsonl --out found
    vtprune calibrate --presets --images my-pictures --server http://localhost:8000 --out found
    vtprune calibrate --gate 3 --scenes 150 --out gate
    vtprune calibrate --study --out docs/schedules
    vtprune serve llava-hf/llava-1.5-7b-hf --prune-schedule 7b/schedule.json
    vtprune serve --prune-layers 3:vision=1 --prune-gate gate/exit-3.gate

A tolerance asks for the fewest tokens that lose at most this share of the answers (G-Search); a budget for
the best answers at a share of the unpruned prompt's FLOPs or KV bytes (P-Sigmoid). Both are arXiv
2412.00556's, as `vtprune_calibrate.search` says. The questions that decide are not those that confirm: part
of the file's pictures is held out, and drawn scenes are of the validation and the test split. An interrupted
run goes on where it stopped when the command is given again. Without MODEL the embedded demo model answers,
on transformers, as LLaVA with a Llama decoder does; with --server any model that vtprune serves, and the
server's own prune layers are the candidates. Exit status: 0, or 2 with one sentence where something cannot
run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from vllm_vtprune import demo_model
from vllm_vtprune.errors import VTPruneError
from vllm_vtprune.settings import VisionSettings
from vtprune_calibrate.arguments import make_parser
from vtprune_calibrate.document import data_hash
from vtprune_calibrate.gate import run_gates
from vtprune_calibrate.presets import run_presets
from vtprune_calibrate.run import JOURNAL, Calibration, Parts, held_out, run
from vtprune_calibrate.study import run_study
from vtprune_calibrate.subject import Subject, checkpoint_subject, server_model, server_subject
from vtprune_eval.options import model_config
from vtprune_eval.pictures import EncodedPictures
from vtprune_eval.scenes import BASE_SIZE
from vtprune_eval.server_backend import RemoteRunner
from vtprune_eval.tasks import drawn_questions, file_questions, folder_pictures
from vtprune_eval.transformers_backend import LocalModel
from vtprune_loadtest.command import command, make_folder


def main(argv: Sequence[str] | None = None, prog: str = "vtprune calibrate") -> int:
    """Run the command line; gives the exit status."""
    return command(
        prog, lambda: _run(make_parser(prog, __doc__).parse_args(argv)), (VTPruneError, OSError, ValueError)
    )


def _run(options: argparse.Namespace) -> None:
    if options.study:
        _study(options)
        return
    if options.presets:
        _presets(options)
        return
    if options.gate is not None:
        _gates(options)
        return
    if options.images is not None:
        raise ValueError(
            "--images holds pictures alone, which --presets takes: a schedule needs --questions."
        )
    if (options.tolerance is None) == (options.budget is None):
        raise ValueError(
            "Give one of --tolerance and --budget: the fewest tokens, or the best answers; or --presets."
        )
    if options.server:
        if options.model is not None or (options.relevance, options.window) != ("attention", 8):
            raise ValueError("A server has a model, a rating and a window of its own: leave out yours.")
        parts = _parts(options, BASE_SIZE)  # a bad file is told before the server is asked
        subject = server_subject(options.server, options.api_key, options.concurrency)
    else:
        config = model_config(options.model)
        parts = _parts(options, config.vision_config.image_size)
        subject = _checkpoint(options, config)
    calibration = _calibration(options, subject, parts)
    wanted = options.budget if options.tolerance is None else options.tolerance
    for path in run(calibration, wanted, options.bands, options.candidates, _say):
        print(f"wrote {path}")


def _gates(options: argparse.Namespace) -> None:
    if options.tolerance is not None or options.budget is not None or options.server:
        raise ValueError(
            "--gate trains on a checkpoint, and has no goal: leave out --server, --tolerance and --budget."
        )
    config = model_config(options.model)
    parts = _parts(options, config.vision_config.image_size)
    calibration = _calibration(options, _checkpoint(options, config), parts)
    for path in run_gates(calibration, options.gate, _say):
        print(f"wrote {path}")


def _study(options: argparse.Namespace) -> None:
    if any(goal is not None for goal in (options.model, options.tolerance, options.budget, options.gate)):
        raise ValueError("--study is the demo model's, and has goals of its own: leave out MODEL and goals.")
    config = model_config(None)
    parts = _parts(options, config.vision_config.image_size)
    calibration = _calibration(options, _checkpoint(options, config), parts)
    for path in run_study(calibration, demo_model.PRUNE_LAYER, options.bands, _say):
        print(f"wrote {path}")
    # the folder is a document's: what has been written needs no resuming
    (options.out / JOURNAL).unlink()


def _presets(options: argparse.Namespace) -> None:
    if options.tolerance is not None or options.budget is not None:
        raise ValueError("--presets finds no schedule: leave out --tolerance and --budget.")
    if options.server and options.model is not None:
        raise ValueError("A server has a model of its own: leave out yours.")
    config = None if options.server else model_config(options.model)
    size = BASE_SIZE if config is None else config.vision_config.image_size
    if options.images is not None:
        questions = folder_pictures(options.images)
    elif options.questions is not None:
        questions = file_questions(options.questions)
    else:
        questions = drawn_questions("validation", options.scenes, size, options.domain)
    pictures: EncodedPictures | RemoteRunner
    if config is None:
        model = server_model(options.server, options.api_key)
        pictures = RemoteRunner(
            options.server, questions, api_key=options.api_key, concurrency=options.concurrency
        )
    else:
        subject = _checkpoint(options, config)
        model = {"name": subject.name, "weights": subject.weights}
        pictures = _load(options).encode(questions, frozenset())
    facts = {"model": model, "data": {"name": questions.name, "sha256": data_hash([questions])}}
    for path in run_presets(pictures, facts, make_folder("--out", options.out), _say):
        print(f"wrote {path}")


def _calibration(options: argparse.Namespace, subject: Subject, parts: Parts) -> Calibration:
    vision = VisionSettings(aggressiveness=options.aggressiveness)
    folder = make_folder("--out", options.out)
    return Calibration(subject, parts, vision, options.by, folder, options.max_tokens)


def _checkpoint(options: argparse.Namespace, config: Any) -> Subject:
    disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch finds no CUDA device on this machine.")
    checkpoint = options.model or str(demo_model.FOLDER)
    written = json.loads(config.to_json_string(use_diff=False))
    return checkpoint_subject(
        checkpoint,
        written,
        options.relevance,
        options.window,
        lambda: _load(options),
    )


def _load(options: argparse.Namespace) -> LocalModel:
    checkpoint = options.model or str(demo_model.FOLDER)
    return LocalModel(checkpoint, options.device, getattr(torch, options.dtype))


def _parts(options: argparse.Namespace, size: int) -> Parts:
    if options.questions is not None:
        return held_out(file_questions(options.questions, options.suffix), options.hold_out)
    validation, test = (
        drawn_questions(split, options.scenes, size, options.domain) for split in ("validation", "test")
    )
    return Parts(validation, test)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
