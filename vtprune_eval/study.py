# SPDX-License-Identifier: Apache-2.0
"""The study in docs/evaluation, by one command: `vtprune eval --study --out docs/evaluation`.

It may be interrupted: the replies of what was run lie in a folder beside the results until all is done, and
the same command goes on from there.

Validation scenes decide (the presets' aggressiveness, stage 2's defaults), test scenes report.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vllm_vtprune.contract import KVScope
from vllm_vtprune.kv_drop.relevance import RELEVANCE
from vllm_vtprune.selection import METHODS
from vllm_vtprune.settings import KVSettings, VisionSettings
from vllm_vtprune.vision.features import needs_of
from vtprune_eval.calibrate import calibrate, mean_curves, objects_kept, view_scores
from vtprune_eval.draw import draw_kept
from vtprune_eval.measure import Progress, evaluate
from vtprune_eval.plots import ADAPTIVE, Series, plot_accuracy, plot_curve, series_by_method
from vtprune_eval.report import dump, write_page
from vtprune_eval.setting import DOWNSCALE, Setting
from vtprune_eval.tasks import Questions, drawn_questions
from vtprune_eval.transformers_backend import LocalModel, LocalRunner

#: Mean shares of the vision tokens at which methods are compared, and which the presets are calibrated to.
SHARES = {"light": 0.33, "balanced": 0.22, "aggressive": 0.11}
KV_KEEPS = (0.75, 0.5, 0.25)
WINDOWS = (2, 4, 8, 16)
_AS_GOOD = 0.02


@dataclass(frozen=True)
class StudySize:
    """How many scenes of each split; `deciding` of the validation scenes choose stage 2's defaults."""

    test: int = 300
    validation: int = 300
    deciding: int = 100


def run_study(model: LocalModel, size: StudySize, folder: Path, progress: Progress) -> list[Path]:
    """Calibrate, choose, compare; write results.json, results.md and the plots, and return their paths."""
    memory = folder / f".replies-{fingerprint(model)}"
    # under a fixed share of a picture both keep what `topk` keeps; the first has a count of its own, and the
    # other differs for videos
    names = [name for name in METHODS if name not in ("inflection", "inflection_temporal")]
    everything = needs_of([_fixed(name, 0.5) for name in names])
    held_out = _validation(model, size.validation, memory)
    calibration = calibrate(view_scores(held_out.pictures), SHARES.values())
    held_out = _validation(model, size.deciding, memory)
    presets = {name: calibration.chosen[share] for name, share in SHARES.items()}
    progress(f"calibrated on validation: {presets}")
    balanced = VisionSettings(aggressiveness=presets["balanced"])

    deciding = evaluate(held_out, _stage2_grid(model, balanced), progress)
    layer = choose_prune_layer(deciding["rows"])
    progress(f"prune layer {layer}")
    rating = evaluate(held_out, _rating_grid(layer, balanced), progress, baselines=())

    questions = drawn_questions("test", size.test, model.image_size)
    runner = LocalRunner(model, questions, everything, memory=memory / f"test-{size.test}")
    fixed = [_fixed(name, share) for share, name in product(SHARES.values(), (*names, DOWNSCALE))]
    adaptive = [
        VisionSettings(method=name, aggressiveness=amount)
        for amount, name in product(presets.values(), ("inflection", "inflection_diverse"))
    ]
    documents = {
        "fixed": evaluate(runner, map(Setting, fixed), progress),
        "adaptive": evaluate(runner, map(Setting, adaptive), progress),
        "stage2": evaluate(runner, _stage2_report(layer, balanced), progress),
    }
    _add_objects(documents, runner)
    result = {
        "model": {"name": model.name, "sha256": fingerprint(model)},
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "scenes": asdict(size),
        "presets": presets,
        "prune_layer": layer,
        "share_by_aggressiveness": {f"{a:g}": round(share, 4) for a, share in calibration.shares.items()},
        "deciding": deciding,
        "rating": rating,
        **documents,
    }
    path = folder / "results.json"
    path.write_text(dump(result), encoding="utf-8")
    written = [path, write_page(result, folder / "results.md"), *_plots(result, model, runner, folder)]
    shutil.rmtree(memory, ignore_errors=True)
    return written


def choose_prune_layer(rows: Sequence[dict[str, Any]]) -> int:
    """The smallest K within `_AS_GOOD` of the best accuracy, averaged over the settings that drop.

    A larger K rates better and frees less, so the best alone would always be the last.
    """
    sums: dict[int, list[float]] = {}
    for row in rows:
        if (layer := row["setting"]["prune_layer"]) is not None:
            sums.setdefault(layer, []).append(row["accuracy"]["value"])
    means = {layer: sum(values) / len(values) for layer, values in sums.items()}
    return min(layer for layer, mean in means.items() if mean >= max(means.values()) - _AS_GOOD)


def _validation(model: LocalModel, scenes: int, memory: Path) -> LocalRunner:
    questions = drawn_questions("validation", scenes, model.image_size)
    return LocalRunner(model, questions, frozenset(), memory=memory / f"validation-{scenes}")


def _fixed(method: str, share: float) -> VisionSettings:
    return VisionSettings(method=method, aggressiveness=None, keep_ratio=share)


def _stage2_grid(model: LocalModel, balanced: VisionSettings) -> list[Setting]:
    """Every K with every keep share, behind a whole picture and behind `balanced`."""
    return [
        Setting(vision, KVSettings(keep), layer)
        for vision, layer, keep in product(
            (VisionSettings(), balanced), range(1, model.decoder.layers), KV_KEEPS
        )
    ]


def _rating_grid(layer: int, balanced: VisionSettings) -> list[Setting]:
    """Every window with every relevance, and with the other scope."""
    ratings: list[tuple[str, KVScope]] = [
        *((name, "all") for name, rating in RELEVANCE.items() if not rating.inherits),
        ("attention", "vision"),
    ]
    return [
        Setting(vision, KVSettings(keep, scope), layer, window, relevance)
        for vision, keep, window, (relevance, scope) in product(
            (VisionSettings(), balanced), (0.5, 0.25), WINDOWS, ratings
        )
    ]


def _stage2_report(layer: int, balanced: VisionSettings) -> list[Setting]:
    keeps = (1.0, *KV_KEEPS, 0.1)
    settings = [
        Setting(vision, KVSettings(keep), layer)
        for vision, keep in product((VisionSettings(), balanced), keeps)
    ]
    return [setting for setting in settings if setting.prunes]


def _add_objects(documents: dict[str, dict[str, Any]], runner: LocalRunner) -> None:
    """Put into each stage-1 row how much of the objects it keeps."""
    owner = runner.questions.owner
    if owner is None:
        return
    for name in ("fixed", "adaptive"):
        for row in documents[name]["rows"][1:]:
            asked = row["setting"]
            if asked["method"] == DOWNSCALE:
                continue
            vision = VisionSettings(asked["method"], asked["aggressiveness"], asked["keep_ratio"])
            row["objects"] = objects_kept(runner.pictures, vision, owner)


def _plots(result: dict[str, Any], model: LocalModel, runner: LocalRunner, folder: Path) -> list[Path]:
    rows, adaptive = result["fixed"]["rows"], result["adaptive"]["rows"]
    unpruned = rows[0]["accuracy"]
    series = series_by_method(rows)
    for name, points in series_by_method(adaptive, baselines=False).items():
        series[name + ADAPTIVE] = points
    about = f"{result['fixed']['questions']['asked']} questions on {result['scenes']['test']} test scenes"
    paths = [plot_accuracy(series, unpruned, f"Stage 1: {about}", folder / "accuracy.png")]
    paths.append(
        plot_accuracy(
            _stage2_series(result["stage2"]["rows"], adaptive),
            unpruned,
            f"Both stages, K = {result['prune_layer']}: {about}",
            folder / "stage2.png",
            x="share of the unpruned prompt's KV cache",
        )
    )
    shapes = runner.questions.shapes
    if shapes is not None:
        groups = {f"{n} shape{'s' if n > 1 else ''}": shapes == n for n in np.unique(shapes).tolist()}
        cuts = {
            name: next(r["share_kept"] for r in adaptive if r["setting"]["aggressiveness"] == amount)
            for name, amount in result["presets"].items()
        }
        paths.append(plot_curve(mean_curves(runner.pictures, groups), cuts, folder / "curve.png"))
        paths += _examples(result["presets"]["balanced"], model, runner.questions, folder)
    return paths


def _stage2_series(rows: Sequence[dict[str, Any]], adaptive: Sequence[dict[str, Any]]) -> Series:
    """Accuracy against cache share: stage 1 alone, stage 2 alone and at random, and both."""
    alone, both, chance = "stage 2 alone", "stage 2 behind balanced", "stage 2 alone, dropping at random"
    series: Series = {"stage 1 alone": [], alone: [], both: [], chance: []}
    for row in adaptive[1:]:
        if row["setting"]["method"] == "inflection":
            series["stage 1 alone"].append((row["cache_share"], row["accuracy"]))
    for row in rows[1:]:
        asked = row["setting"]
        if asked["kv_keep"] == 1:
            continue
        series[both if asked["aggressiveness"] else alone].append((row["cache_share"], row["accuracy"]))
        if not asked["aggressiveness"]:
            series[chance].append((row["cache_share"], row["versus"]["random"]["accuracy"]))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in series.items() if points}


def _examples(aggressiveness: float, model: LocalModel, questions: Questions, folder: Path) -> list[Path]:
    """A simple and a crowded test scene with the patches that `balanced` keeps."""
    shapes = questions.shapes if questions.shapes is not None else np.zeros(0)
    setting, paths = Setting(VisionSettings(aggressiveness=aggressiveness)), []
    for name, number in (("simple", int(shapes.argmin())), ("crowded", int(shapes.argmax()))):
        image: Image.Image = questions.pictures[number]
        paths.append(folder / f"kept-{name}.png")
        draw_kept(model, image, replace(setting), paths[-1])
    return paths


def fingerprint(model: LocalModel) -> str:
    """Of all weights, so that a result names the model it belongs to."""
    digest = hashlib.sha256()
    for module in (
        model.encoder.modules["tower"],
        model.encoder.modules["projector"],
        model.decoder.language,
    ):
        for name, weight in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
