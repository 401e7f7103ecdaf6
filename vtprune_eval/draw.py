# SPDX-License-Identifier: Apache-2.0
"""One picture: its similarity curve with the cut, and the patches that stay drawn over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vllm_vtprune.selection import get_score, score_curve
from vllm_vtprune.vision.features import needs_of
from vtprune_eval.plots import plotted
from vtprune_eval.setting import Setting
from vtprune_eval.tasks import Questions
from vtprune_eval.transformers_backend import LocalModel

_DPI = 90


def draw_kept(model: LocalModel, image: Image.Image, setting: Setting, path: Path) -> str:
    """Write the plot; needs matplotlib.

    Args:
        model: whose tower looks.
        image: the picture.
        setting: stage 1's method, amount and score.
        path: the PNG to write.

    Returns:
        A sentence with the counts.
    """
    questions = Questions(path.name, [image.convert("RGB")], [])
    pictures = model.encode(questions, needs_of([setting.vision]))
    selection = pictures.select(setting)[0]
    batch = pictures.batches[0]
    curve = score_curve(get_score(setting.vision.score)(batch))
    kept = torch.zeros(batch.tokens, dtype=torch.bool)
    kept[selection.indices.cpu()] = True
    seen = _as_seen(model, questions.pictures[0])
    _plot(
        seen, kept.numpy().reshape(batch.grid), curve.scores[0].cpu().numpy(), selection.count, setting, path
    )
    return f"{path}: {selection.count} of {batch.tokens} vision tokens stay ({setting.label})"


def _as_seen(model: LocalModel, image: Image.Image) -> NDArray[np.float64]:
    """The picture after the checkpoint's preprocessing, [H, W, 3] in 0 to 1."""
    processor = model.processor.image_processor
    pixels = processor(images=[image], return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    shown: NDArray[np.float64] = (pixels * processor.image_std + processor.image_mean).clip(0, 1)
    return shown


def _plot(
    seen: NDArray[np.float64],
    kept: NDArray[np.bool_],
    scores: NDArray[np.float64],
    count: int,
    setting: Setting,
    path: Path,
) -> None:
    with plotted(path, 1, 3, _DPI, figsize=(12, 4), width_ratios=(1, 1, 1.3)) as (_, axes):
        left, middle, right = axes
        left.imshow(seen)
        left.set_title("as the tower sees it")
        rows, columns = kept.shape
        height, width = seen.shape[0] // rows, seen.shape[1] // columns
        shown = np.kron(kept, np.ones((height, width), dtype=bool))[..., None]
        area = seen[: shown.shape[0], : shown.shape[1]]
        middle.imshow(np.where(shown, area, 0.85 + 0.1 * area))
        middle.set_title(f"{count} of {kept.size} tokens stay")
        for axis in (left, middle):
            axis.set_axis_off()
        _curve(right, scores, count, setting)


def _curve(axis: Any, scores: NDArray[np.float64], count: int, setting: Setting) -> None:
    places = np.arange(1, len(scores) + 1)
    axis.plot(places, scores, color="#20639b")
    if count <= len(scores):
        axis.axvline(count, color="#d1495b", linestyle="--", linewidth=1)
        axis.plot(count, scores[count - 1], "o", color="#d1495b", label=f"cut: {count} tokens")
        axis.legend(frameon=False)
    axis.fill_between(places[:count], scores[:count], scores.min(), alpha=0.15, color="#20639b")
    axis.set_xlabel("patches by falling score")
    axis.set_ylabel({"cosine": "cosine to CLS"}.get(setting.vision.score, setting.vision.score))
    axis.set_title(setting.label)
    axis.spines[["top", "right"]].set_visible(False)
