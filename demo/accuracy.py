# SPDX-License-Identifier: Apache-2.0
"""Accuracy by question kind, from tower features and any choice of patches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from demo.packing import answer_logits, pack
from vtprune_eval.drawn import ALL_KINDS, Drawn, is_held_out, questions_each
from vtprune_eval.scene_questions import Question

Keep = Callable[[int, Tensor], Tensor]
"""Patch choice: scene number and the tower's states [1 + P, width] to kept patch indices in raster order."""


@dataclass
class Accuracy:
    """Right and asked questions by kind.

    `held_out` counts those about a colour-shape pair or a page's layout never seen in training.
    """

    right: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)

    def count(self, drawn: Drawn, question: Question, correct: bool) -> None:
        """Add one answered question."""
        held_out = ["held_out"] if is_held_out(drawn, question) else []
        for name in (question.kind, *held_out):
            self.asked[name] += 1
            self.right[name] += correct

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "overall": self.overall,
            "by_kind": self.by_kind,
            "held_out": self.held_out,
            "asked": dict(self.asked),
        }

    @property
    def overall(self) -> float:
        """Share of all questions answered right."""
        return sum(self.right[kind] for kind in ALL_KINDS) / max(
            1, sum(self.asked[kind] for kind in ALL_KINDS)
        )

    @property
    def by_kind(self) -> dict[str, float]:
        """Share answered right of each kind that was asked."""
        return {kind: self.right[kind] / self.asked[kind] for kind in ALL_KINDS if self.asked[kind]}

    @property
    def held_out(self) -> float | None:
        """Share answered right of what is held out; None where nothing was."""
        return self.right["held_out"] / self.asked["held_out"] if self.asked["held_out"] else None


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
        questions = [
            (scene, question) for scene, of_it in zip(group, asked, strict=True) for question in of_it
        ]
        for (scene, question), correct in zip(questions, right.view(-1, 2).all(1).tolist(), strict=True):
            accuracy.count(scene, question, correct)
    return accuracy
