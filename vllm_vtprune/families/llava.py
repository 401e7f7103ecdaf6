# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: a CLIP tower with CLS, or a SigLIP tower without; a projector per patch; one view."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vllm_vtprune.families.base import Family, Item, Kept, Projected, TowerOutput, View
from vllm_vtprune.families.fixed_tower import (
    FixedTower,
    build_tower,
    feature_layer_index,
    has_cls,
    patch_grid,
    tower_outputs,
)
from vllm_vtprune.vision.captured import Graphs
from vllm_vtprune.vision.crop import bounded, crop_of


class Llava(Family):
    """`LlavaForConditionalGeneration`. A unit is a patch."""

    # public checkpoints, then what transformers 5 saves
    prefixes: ClassVar[Mapping[str, str]] = {
        "vision_tower.vision_model.": "tower.",
        "vision_tower.": "tower.",
        "multi_modal_projector.": "projector.",
    }
    adds_tokens = True
    captures = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.outputs = tower_outputs(config)
        self.clip_units = has_cls(config)
        self.default_score = "cosine" if has_cls(config) else "received"
        # "full" hands CLS to the language model too, ahead of the patches
        self.with_cls = config.vision_feature_select_strategy == "full" and has_cls(config)

    def check(self) -> None:
        """A CLIP or SigLIP tower for square pictures, and one feature layer."""
        self._grid = patch_grid(self.config)
        feature_layer_index(self.config)
        self._fixed = FixedTower(self.config)

    def build(self) -> nn.Module:
        """`tower` and `projector`."""
        return nn.ModuleDict(
            {"tower": build_tower(self.config), "projector": LlavaMultiModalProjector(self.config)}
        )

    def warm_up(
        self, modules: Any, like: torch.Tensor, sets: Collection[frozenset[str]], graphs: Graphs | None
    ) -> None:
        """Capture or trace the tower."""
        self._fixed.prepare(modules["tower"], like, sets, graphs)

    def encode(self, modules: Any, items: Sequence[Item], outputs: frozenset[str]) -> list[TowerOutput]:
        """All images in one pass."""
        pixels = torch.stack([item.inputs["pixel_values"] for item in items])
        hidden, extra = self._fixed.run(modules["tower"], pixels, outputs)
        first = int(has_cls(self.config))
        return [
            TowerOutput(
                patches=hidden[i, first:].clone(),
                views=(View(self._grid),),
                cls=hidden[i, :1].clone() if first else None,
                **{name: values[i].clone() for name, values in extra.items()},  # type: ignore[arg-type]
            )
            for i in range(len(items))
        ]

    def project(self, modules: Any, images: Sequence[Kept]) -> list[Projected]:
        """Only the kept patches, behind CLS where the checkpoint says so."""
        rows = [self._rows(kept) for kept in images]
        embeddings = modules["projector"](torch.cat(rows)).split([r.shape[0] for r in rows])
        return [(e, self._places(kept)) for e, kept in zip(embeddings, images, strict=True)]

    def _rows(self, kept: Kept) -> torch.Tensor:
        if not self.with_cls or kept.output.cls is None:
            return kept.tokens
        return torch.cat((kept.output.cls, kept.tokens))

    def _places(self, kept: Kept) -> torch.Tensor:
        units = with_added(kept)
        return torch.cat((units.new_zeros(1), units + 1)) if self.with_cls else units

    def patches(self, item: Item) -> int:
        """The same for every image."""
        return int(has_cls(self.config)) + self._grid[0] * self._grid[1]

    def unpruned_grid(self) -> tuple[int, int]:
        """The same for every image."""
        return self._grid

    def places(self) -> int:
        """The same for every image."""
        return self._grid[0] * self._grid[1] + int(self.with_cls)

    def bounded(self, image: Image.Image, image_processor: Any) -> Image.Image:
        """See `vision.crop.bounded`."""
        return bounded(image, image_processor)

    def crops(
        self, size: tuple[int, int], image_processor: Any, output: TowerOutput
    ) -> list[dict[str, float]]:
        """See `vision.crop.crop_of`."""
        return [crop_of(size, image_processor)]


def with_added(kept: Kept) -> torch.Tensor:
    """[k'] places, ascending: the kept units', and for tokens that stand for several, those of dropped units.

    For places that are all alike, so that which of them is taken says nothing.
    """
    if not kept.added:
        return kept.units
    stays = torch.zeros(kept.output.patches.shape[0], dtype=torch.bool, device=kept.units.device)
    stays[kept.units] = True
    dropped = (~stays).nonzero().flatten()
    return torch.cat((kept.units, dropped[: kept.added])).sort().values
