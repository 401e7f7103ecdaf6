# SPDX-License-Identifier: Apache-2.0
"""Calibration of the presets and how much of the objects a choice keeps, on made-up features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.checkpoints import random_llava
from vllm_vtprune.selection import VisionFeatures, inflection_counts
from vllm_vtprune.settings import VisionSettings
from vllm_vtprune.vision.encoder import VisionEncoder
from vtprune_eval.calibrate import calibrate, mean_curves, objects_kept, view_scores
from vtprune_eval.draw import draw_kept
from vtprune_eval.pictures import EncodedPictures
from vtprune_eval.setting import Setting
from vtprune_eval.tasks import drawn_questions
from vtprune_eval.transformers_backend import LocalModel

N = 100


class NoEncoder(VisionEncoder):
    """Selection alone needs none."""

    def __init__(self) -> None:
        pass


def pictures(cosines: torch.Tensor) -> EncodedPictures:
    """Pictures [P, N] whose patches have these cosines to CLS, in batches of 3."""
    patches = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=-1)
    batches = [
        VisionFeatures(rows, torch.tensor([[1.0, 0.0]]).expand(len(rows), -1), (10, 10), (0,) * len(rows))
        for rows in patches.split(3)
    ]
    return EncodedPictures(NoEncoder(), [], batches)


@pytest.fixture
def long_tailed() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tail = torch.linspace(0, 6, N).neg().exp() * 0.9
    return torch.stack([tail[torch.randperm(N, generator=generator)] ** power for power in (0.5, 1, 2, 3, 4)])


def test_the_aggressiveness_found_keeps_the_share_asked_for(long_tailed: torch.Tensor) -> None:
    found = calibrate(view_scores(pictures(long_tailed)), (0.33, 0.22, 0.11))
    shares = list(found.shares.values())
    assert shares == sorted(shares, reverse=True)
    for wanted, amount in found.chosen.items():
        mean = float(inflection_counts(long_tailed, amount).double().mean()) / N
        assert found.shares[amount] == pytest.approx(mean, abs=0.002)
        assert mean == pytest.approx(wanted, abs=0.02)


def test_views_are_cut_each_by_its_own_curve(long_tailed: torch.Tensor) -> None:
    small = torch.linspace(0, 4, 20).neg().exp()
    tiled = [[long_tailed[0], small], [long_tailed[1]], [small]]
    found = calibrate(tiled, (0.22,))
    for amount in (0.2, 0.5, 0.9):
        counts = [[int(inflection_counts(view[None], amount)[0]) for view in picture] for picture in tiled]
        expected = [sum(counts[0]) / 120, counts[1][0] / N, counts[2][0] / 20]
        assert found.shares[amount] == pytest.approx(sum(expected) / 3)


def test_mean_curves_are_sorted_means(long_tailed: torch.Tensor) -> None:
    first = np.array([True, False, False, False, False])
    curves = mean_curves(pictures(long_tailed), {"first": first, "rest": ~first, "none": first & ~first})
    assert set(curves) == {"first", "rest"}
    expected = long_tailed[0].sort(descending=True).values
    np.testing.assert_allclose(curves["first"], expected, atol=1e-6)
    np.testing.assert_allclose(
        curves["rest"], long_tailed[1:].sort(1, descending=True).values.mean(0), atol=1e-6
    )


def test_objects_kept() -> None:
    # one picture: patches 0 to 3 are object 0, 4 and 5 object 1, 6 to 9 object 2; the scores fall from 0 on
    owner = np.full((2, N), -1)
    owner[0, :10] = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    owner[1, 99] = 0
    falling = torch.linspace(0.9, 0.1, N).expand(2, -1)
    kept = objects_kept(
        pictures(falling), VisionSettings(method="topk", aggressiveness=None, keep_ratio=0.07), owner
    )
    # of the eleven object patches seven stay: object 0 and 1 whole, one of four of object 2, none elsewhere
    assert kept == {"patches": round(7 / 11, 4), "seen": 0.75, "half_seen": 0.5}


def test_the_plot_shows_a_merging_method_too(tmp_path: Path) -> None:
    model = LocalModel(str(random_llava(tmp_path / "llava", layers=2)))
    image = drawn_questions("test", 1, model.image_size).pictures[0]
    setting = Setting(VisionSettings(method="prumerge", aggressiveness=0.5))
    sentence = draw_kept(model, image, setting, tmp_path / "plot.png")
    assert "prumerge" in sentence
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.width > plot.height
