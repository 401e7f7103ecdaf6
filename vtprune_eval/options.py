# SPDX-License-Identifier: Apache-2.0
"""From the command line to the settings of a run, judged before anything long starts."""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import torch
from transformers import AutoConfig

from vllm_vtprune import demo_model
from vllm_vtprune.kv_drop.schedule import resolve
from vllm_vtprune.selection import DEFAULT_METHOD
from vllm_vtprune.settings import KVSettings, VisionSettings
from vtprune_eval.scenes import check_size
from vtprune_eval.setting import AS_SCHEDULED, Setting

#: What a server's operator decides: flag -> attribute and default.
_OPERATORS = {
    "--prune-layer": ("prune_layer", []),
    "--schedule": ("schedule", []),
    "--window": ("window", [8]),
    "--relevance": ("relevance", ["attention"]),
    "--score": ("score", "cosine"),
    "--max-share": ("max_share", [1.0]),
}


def judge(options: argparse.Namespace) -> None:
    """Refuse what cannot run, from the arguments and the model's configuration alone.

    Raises:
        ValueError: the sentence says which argument to change.
    """
    if options.aggressiveness and options.keep_ratio:
        raise ValueError(
            "--aggressiveness and --keep-ratio exclude each other: run them one after the other."
        )
    if options.schedule and (options.preset or options.prune_layer or options.kv_keep != [1.0]):
        raise ValueError("--schedule stands in place of --preset, --prune-layer and --kv-keep.")
    if options.study and (options.out is None or options.server):
        raise ValueError("--study needs --out, and runs on transformers: leave out --server.")
    if options.size is not None:
        if not (options.server or options.write_questions) or options.questions is not None:
            raise ValueError(
                "--size is of drawn pictures and needs --server or --write-questions: a tower here has its "
                "own."
            )
        check_size(options.size)
    if options.write_questions is not None and (options.questions or options.tasks):
        raise ValueError("--write-questions writes drawn questions: leave out --questions and --tasks.")
    if missing := [str(path) for path in options.draw or () if not path.is_file()]:
        raise ValueError(f"--draw: there is no picture {', '.join(missing)}.")
    if options.tasks:
        _judge_tasks(options)
    elif options.server:
        _judge_for_server(options)
    else:
        _judge_for_transformers(options)


def settings_of(options: argparse.Namespace) -> list[Setting]:
    """Every combination of the values given; the demo model has a prune layer of its own."""
    own = demo_model.PRUNE_LAYER if options.model is None and not options.server else None
    layers = options.prune_layer or [own]
    if options.preset:
        return [Setting.preset(name, layer) for name, layer in product(options.preset, layers)]
    amounts: list[dict[str, Any]] = [{"keep_ratio": r, "aggressiveness": None} for r in options.keep_ratio]
    amounts = amounts or [{"aggressiveness": a} for a in options.aggressiveness or [0.0]]
    visions = [
        VisionSettings(method=method, score=options.score, max_share=most, **amount)
        for method, amount, most in product(options.method, amounts, options.max_share)
    ]
    if options.schedule:
        return [
            setting
            for vision, window, text in product(visions, options.window, options.schedule)
            for setting in _scheduled(vision, window, text, options)
        ]
    drops = product(options.kv_keep, options.kv_scope, layers, options.window, options.relevance)
    settings = [
        Setting(vision, KVSettings(keep, scope), layer, window, relevance)
        for vision, (keep, scope, layer, window, relevance) in product(visions, list(drops))
    ]
    # without dropping, stage 2's other settings make no difference
    once = {
        (s.vision, (s.kv, s.prune_layer, s.window, s.relevance) if s.kv.drops else None): s for s in settings
    }
    return list(once.values())


def _scheduled(vision: VisionSettings, window: int, text: str, options: argparse.Namespace) -> list[Setting]:
    """A schedule as it is, under its own rating where it has one."""
    schedule = resolve(text, model_config(options.model).get_text_config().num_hidden_layers)
    ratings = [",".join(schedule.relevance)] if schedule.relevance else options.relevance
    return [
        Setting(vision, AS_SCHEDULED, None, window, rating, schedule=schedule.prune_layers)
        for rating in ratings
    ]


def model_config(model: str | None) -> Any:
    """The configuration of a checkpoint, the demo model's for None; reads no weights.

    Raises:
        ValueError: there is no such model.
    """
    name = model or str(demo_model.FOLDER)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"MODEL {name} is neither a folder with a checkpoint nor a model found by that name ({reason})."
        ) from None


def _judge_tasks(options: argparse.Namespace) -> None:
    if options.out is None:
        raise ValueError("--tasks needs --out, a folder where what is done is found again.")
    if not options.server and options.model is not None:
        model_config(options.model)
    for flag, given in (
        ("--method", options.method != [DEFAULT_METHOD]),
        ("--aggressiveness", options.aggressiveness),
        ("--keep-ratio", options.keep_ratio),
        ("--questions", options.questions),
        ("--study", options.study),
        ("--draw", options.draw),
    ):
        if given:
            raise ValueError(f"--tasks compares presets (--preset): leave out {flag}.")


def _judge_for_server(options: argparse.Namespace) -> None:
    given = [flag for flag, (name, default) in _OPERATORS.items() if getattr(options, name) != default]
    if given:
        raise ValueError(f"A server has its operator's own {', '.join(given)}: leave that out with --server.")


def _judge_for_transformers(options: argparse.Namespace) -> None:
    device = options.device.partition(":")[0]
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch finds no CUDA device on this machine.")
    dropping = [setting for setting in settings_of(options) if setting.kv.drops]
    if not dropping:
        return
    asked = "--preset" if options.preset else "--kv-keep"
    layers = model_config(options.model).get_text_config().num_hidden_layers
    allowed = f"1 to {layers - 1} for this model's {layers} decoder layers"
    for setting in dropping:
        if setting.schedule:
            continue
        if setting.prune_layer is None:
            raise ValueError(
                f"{asked} drops tokens at a prune layer (kv_keep {setting.kv.keep:g}): name it with "
                f"--prune-layer, {allowed}."
            )
        if setting.prune_layer >= layers:
            raise ValueError(f"--prune-layer must be {allowed}, not {setting.prune_layer}.")
