# SPDX-License-Identifier: Apache-2.0
"""Accuracy while training: packed questions on tower features, any choice of patches.

What the finished model answers is measured by `vtprune_eval`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from demo.packing import answer_logits, pack
from vtprune_eval.drawn import ALL_KINDS, Drawn, questions_each

Keep = Callable[[int, Tensor], Tensor]
"""Patch choice: scene number and the tower's states [1 + P, width] to kept patch indices in raster order."""


@dataclass
class Accuracy:
    """Right and asked questions by kind."""

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, correct: bool) -> None:
        """Add one answered question."""
        self.asked[kind] += 1
        self.right[kind] += correct

    @property
    def overall(self) -> float:
        """Share of all questions answered right."""
        return self.right.total() / max(1, self.asked.total())

    @property
    def by_kind(self) -> dict[str, float]:
        """Share answered right of each kind that was asked."""
        return {kind: self.right[kind] / self.asked[kind] for kind in ALL_KINDS if self.asked[kind]}


@torch.inference_mode()
def measure(
    model: LlavaForConditionalGeneration,
    scenes: list[Drawn],
    states: Tensor,
    keep: Keep | None = None,
    seed: int = 0,
) -> Accuracy:
    """Ask every picture one question of each kind; its word and the end after it must both be right.

    `states` [N, 1 + P, width] are the feature layer's, CLS first; without `keep` all patches are shown.
    """
    accuracy, batch = Accuracy(), 20 if keep is None else 1  # kept counts differ, all patches do not
    for first in range(0, len(scenes), batch):
        group = scenes[first : first + batch]
        asked = [questions_each(scene, random.Random(f"{seed} {scene.index}")) for scene in group]
        patches = states[first : first + batch, 1:]
        if keep is not None:
            patches = patches[:, keep(first, states[first])]
        projected = model.model.multi_modal_projector(patches.to(model.device, model.dtype))
        packed = pack(asked, torch.full((len(group),), patches.shape[1]), model.device)
        right = answer_logits(model, projected, packed).argmax(-1) == packed.targets
        questions = [question for per_scene in asked for question in per_scene]
        for question, correct in zip(questions, right.view(-1, 2).all(1).tolist(), strict=True):
            accuracy.count(question.kind, correct)
    return accuracy
