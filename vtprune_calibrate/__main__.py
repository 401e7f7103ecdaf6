# SPDX-License-Identifier: Apache-2.0
"""Finds the prune schedule, and the presets, for a model and its pictures.

    vtprune calibrate --tolerance 0.01 --out calibration
    vtprune calibrate --budget flops=0.5 --bands 2 --out calibration
    vtprune calibrate llava-hf/llava-1.5-7b-hf --questions mine.jsonl --budget kv=0.4 --device cuda --out 7b
    vtprune calibrate --study --out docs/schedules
    vtprune serve llava-hf/llava-1.5-7b-hf --prune-schedule 7b/schedule.json

A tolerance asks for the fewest tokens that lose at most this share of the answers (G-Search); a budget for
the best answers at a share of the unpruned prompt's FLOPs or KV bytes (P-Sigmoid). Both are arXiv
2412.00556's, as `vtprune_calibrate.search` says. The questions that decide are not those that confirm: part
of the file's pictures is held out, and drawn scenes are of the validation and the test split. An interrupted
run goes on where it stopped when the command is given again. Without MODEL the embedded demo model answers,
on transformers. Exit status: 0, or 2 with one sentence where something cannot run.
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
from vtprune_calibrate.arguments import make_parser
from vtprune_calibrate.run import JOURNAL, Calibration, Parts, base_setting, held_out, run
from vtprune_calibrate.study import run_study
from vtprune_eval.options import model_config
from vtprune_eval.tasks import drawn_questions, file_questions
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
    if (options.tolerance is None) == (options.budget is None):
        raise ValueError("Give one of --tolerance and --budget: the fewest tokens, or the best answers.")
    config = model_config(options.model)
    parts = _parts(options, config)
    calibration = _calibration(options, config, parts)
    wanted = options.budget if options.tolerance is None else options.tolerance
    for path in run(calibration, wanted, options.bands, options.candidates, _say):
        print(f"wrote {path}")


def _study(options: argparse.Namespace) -> None:
    if options.model is not None or options.tolerance is not None or options.budget is not None:
        raise ValueError("--study is the demo model's, and has goals of its own: leave out MODEL and goals.")
    config = model_config(None)
    calibration = _calibration(options, config, _parts(options, config))
    for path in run_study(calibration, demo_model.PRUNE_LAYER, options.bands, _say):
        print(f"wrote {path}")
    # the folder is a document's: what has been written needs no resuming
    (options.out / JOURNAL).unlink()


def _calibration(options: argparse.Namespace, config: Any, parts: Parts) -> Calibration:
    disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch finds no CUDA device on this machine.")
    checkpoint = options.model or str(demo_model.FOLDER)
    return Calibration(
        checkpoint,
        json.loads(config.to_json_string(use_diff=False)),
        parts,
        base_setting(options.aggressiveness, options.window, options.relevance),
        options.by,
        make_folder("--out", options.out),
        lambda: LocalModel(checkpoint, options.device, getattr(torch, options.dtype)),
        options.max_tokens,
    )


def _parts(options: argparse.Namespace, config: Any) -> Parts:
    if options.questions is not None:
        return held_out(file_questions(options.questions, options.suffix), options.hold_out)
    size = config.vision_config.image_size
    validation, test = (
        drawn_questions(split, options.scenes, size, options.domain) for split in ("validation", "test")
    )
    return Parts(validation, test)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
