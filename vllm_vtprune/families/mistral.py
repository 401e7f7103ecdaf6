# SPDX-License-Identifier: Apache-2.0
"""Mistral-Small 3.x in Hugging Face format: a Pixtral tower for pictures of any size, units of 2x2 patches.

The tower has no CLS token and every layer attends over the whole picture: a unit's score is the mean of its
patches' received attention. `[IMG_BREAK]` and `[IMG_END]` are tokens of the placeholder that take no
embedding; all of them stay, also of a row that lost every unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PixtralVisionConfig
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector
from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel

from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.families.base import Family, Item, Kept, Projected, TowerOutput, View
from vllm_vtprune.vision.attention import READABLE, read_layers, reading


class Mistral3(Family):
    """A unit is what the patch merger takes, [4 * hidden], patch by patch; only kept ones are merged."""

    prefixes: ClassVar[Mapping[str, str]] = {
        "vision_tower.": "tower.",
        "multi_modal_projector.": "projector.",
    }

    def check(self) -> None:
        """A Pixtral tower and its last layer, as it is published."""
        vision, layer = self.config.vision_config, self.config.vision_feature_layer
        if not isinstance(vision, PixtralVisionConfig):
            raise CheckpointError(
                "vtprune supports Mistral 3 checkpoints with a Pixtral vision tower; this one has "
                f"{vision.model_type!r}."
            )
        if layer != -1:
            raise CheckpointError(
                f"vision_feature_layer is {layer}: vtprune supports Mistral 3 with -1, as it is published."
            )
        patch: Any = vision.patch_size
        self._patch, self._merge = int(patch), int(self.config.spatial_merge_size)

    def build(self) -> nn.Module:
        """`tower` and `projector`."""
        if self.config.projector_hidden_act is None:  # as vLLM's own class does for old configurations
            self.config.projector_hidden_act = "gelu"
        tower = PixtralVisionModel._from_config(self.config.vision_config, attn_implementation=READABLE)
        return nn.ModuleDict({"tower": tower, "projector": Mistral3MultiModalProjector(self.config)})

    def encode(self, modules: Any, items: Sequence[Item], outputs: frozenset[str]) -> list[TowerOutput]:
        """Pictures of equal size in one pass."""
        tower, found = modules["tower"], dict[int, TowerOutput]()
        by_size: dict[tuple[int, int], list[int]] = {}
        for number, item in enumerate(items):
            by_size.setdefault(self._grid(item), []).append(number)
        blocks = tower.transformer.layers
        layers = read_layers(outputs, len(blocks))
        for grid, numbers in by_size.items():
            pixels = torch.stack([items[number].inputs["pixel_values"] for number in numbers])
            with reading({name: blocks[layer].attention for name, layer in layers.items()}) as seen:
                units = self._units(self._hidden(tower, pixels), grid)
            # of a call [B, patches], then [B, units]
            received: dict[str, Any] = {
                name: self._units(calls[0][..., None], grid).mean(-1) for name, calls in seen.items()
            }
            view = View((grid[0] // self._merge, grid[1] // self._merge))
            for row, number in enumerate(numbers):
                found[number] = TowerOutput(
                    patches=units[row].clone(),
                    views=(view,),
                    **{name: values[row : row + 1].clone() for name, values in received.items()},
                )
        return [found[number] for number in range(len(items))]

    @staticmethod
    def _hidden(tower: Any, pixels: Tensor) -> Tensor:
        """[B, patches, D] of pictures [B, 3, H, W], as `PixtralVisionModel.forward`.

        That one strings all pictures into one sequence, under a mask that grows with its square.
        """
        embedded = tower.patch_conv(pixels)
        rows, columns = embedded.shape[-2:]
        hidden = tower.ln_pre(embedded.flatten(2).transpose(1, 2))
        positions = torch.cartesian_prod(
            torch.arange(rows, device=pixels.device), torch.arange(columns, device=pixels.device)
        )
        rotary = tower.patch_positional_embedding(hidden, positions)
        states: Tensor = tower.transformer(hidden, position_embeddings=rotary).last_hidden_state
        return states

    def _units(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, units, merge^2 * C] of values [B, patches, C], patch by patch."""
        rows, columns = grid[0] // self._merge, grid[1] // self._merge
        split = values.view(len(values), rows, self._merge, columns, self._merge, values.shape[-1])
        return split.transpose(2, 3).reshape(len(values), rows * columns, -1)

    def project(self, modules: Any, images: Sequence[Kept]) -> list[Projected]:
        """Merge what stays, as `Mistral3MultiModalProjector.forward` does with whole pictures."""
        projector = modules["projector"]
        rows = torch.cat([kept.tokens for kept in images])
        patches = projector.norm(rows.view(len(rows), self._merge**2, -1))
        # the merger's weights take a channel of all patches after the other (`torch.nn.functional.unfold`)
        merged = projector.patch_merger.merging_layer(patches.transpose(1, 2).flatten(1))
        embeddings = projector.linear_2(projector.act(projector.linear_1(merged)))
        parts = embeddings.split([kept.tokens.shape[0] for kept in images])
        return [(part, kept.units) for part, kept in zip(parts, images, strict=True)]

    def patches(self, item: Item) -> int:
        """As many as the picture has."""
        rows, columns = self._grid(item)
        return rows * columns

    def unpruned_grid(self) -> None:
        """It depends on the picture."""

    def _grid(self, item: Item) -> tuple[int, int]:
        height, width = item.inputs["pixel_values"].shape[-2:]
        return height // self._patch, width // self._patch
