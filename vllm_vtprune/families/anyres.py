# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT and LLaVA-OneVision: a small whole picture and tiles of a large one, each its own view.

OneVision's videos are frames of one tile each, shrunk by half, with one newline behind the last.

The prompt has the whole picture's patches first, then the large picture's rows without their padding, each
followed by an embedding that is no patch (`image_newline`), which always stays: with contiguous positions the
newlines are all that tells rows apart. Where they stand is transformers' own packing
(`LlavaNextModel.pack_image_features`, `LlavaOnevisionModel.pack_image_features`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextMultiModalProjector,
    get_anyres_image_grid_shape,
    unpad_image,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector

from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.families.base import RECEIVED, WHOLE, Family, Item, Kept, Projected, TowerOutput, View
from vllm_vtprune.families.fixed_tower import (
    FixedTower,
    build_tower,
    feature_layer_index,
    has_cls,
    patch_grid,
    tower_outputs,
)
from vllm_vtprune.vision.captured import Graphs

_ATTENTIONS = RECEIVED | {"cls_attention"}


@dataclass(frozen=True)
class Layout:
    """How one picture's units stand in the prompt.

    Attributes:
        side: patches along a tile.
        tiles: rows and columns of tiles.
        inside: the unpadded part of the tiles' patches: first row, first column, rows, columns.
        grid: rows and columns of its units; smaller than the window where the family shrinks large pictures.
    """

    side: int
    tiles: tuple[int, int]
    inside: tuple[int, int, int, int]
    grid: tuple[int, int]

    @cached_property
    def bands(self) -> list[tuple[int, slice, slice]]:
        """Per tile with units left: its number, and its rows and columns among the units'."""
        rows = _spans(self.side, self.tiles[0], self.inside[0], self.inside[2], self.grid[0])
        columns = _spans(self.side, self.tiles[1], self.inside[1], self.inside[3], self.grid[1])
        return [
            (r * self.tiles[1] + c, row, column)
            for r, row in enumerate(rows)
            for c, column in enumerate(columns)
            if row.stop > row.start and column.stop > column.start
        ]

    @property
    def views(self) -> tuple[View, ...]:
        """The whole picture's, then the tiles'."""
        views = [View((self.side, self.side))]
        for _, rows, columns in self.bands:
            grid = rows.stop - rows.start, columns.stop - columns.start
            views.append(View(grid, views[-1].units.stop))
        return tuple(views)

    @cached_property
    def order(self) -> Tensor:
        """[units of the large picture], view after view: their numbers in raster order."""
        raster = torch.arange(self.grid[0] * self.grid[1]).view(self.grid)
        # a picture so narrow that its padding is all there is has rows without units
        units = [raster[rows, columns].flatten() for _, rows, columns in self.bands]
        return torch.cat([raster.new_empty(0), *units])

    @cached_property
    def places(self) -> Tensor:
        """[N]: the place of each unit, view after view."""
        base = self.side**2
        # a newline behind each row
        large = base + self.order + self.order // max(self.grid[1], 1)
        return torch.cat((torch.arange(base), large))

    @cached_property
    def newlines(self) -> Tensor:
        """The places of the rows' newlines."""
        return self.side**2 + (torch.arange(self.grid[0]) + 1) * (self.grid[1] + 1) - 1


def _spans(side: int, tiles: int, first: int, size: int, units: int) -> list[slice]:
    """Which of `units` along one axis lie in each tile: by their middle, in the tiles' own coordinates."""
    owner = [(first + int((unit + 0.5) * size / units)) // side for unit in range(units)]
    return [
        slice(owner.index(t), owner.index(t) + owner.count(t)) if t in owner else slice(0, 0)
        for t in range(tiles)
    ]


class AnyRes(Family):
    """What both share."""

    prefixes: ClassVar[Mapping[str, str]] = {
        "vision_tower.vision_model.": "tower.",
        "vision_tower.": "tower.",
        "multi_modal_projector.": "projector.",
        "image_newline": "image_newline",
    }
    captures = True
    projector: ClassVar[type[nn.Module]]
    #: Tiles' worth of patches above which the large picture is shrunk; None: never.
    most_tiles: int | None = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.outputs = tower_outputs(config) - {"keys"}
        self.default_score = "cosine" if "cls" in self.outputs else "received"

    def check(self) -> None:
        """A CLIP or SigLIP tower for square pictures, and one feature layer."""
        self._side, _ = patch_grid(self.config)
        feature_layer_index(self.config)
        self._first = int(has_cls(self.config))
        self._fixed = FixedTower(self.config)

    def build(self) -> nn.Module:
        """`tower`, `projector` and `image_newline`."""
        modules = nn.ModuleDict({"tower": build_tower(self.config), "projector": self.projector(self.config)})
        modules.image_newline = nn.Parameter(torch.zeros(self.config.get_text_config().hidden_size))
        return modules

    def warm_up(
        self, modules: Any, like: Tensor, sets: Collection[frozenset[str]], graphs: Graphs | None
    ) -> None:
        """Capture or trace the tower."""
        self._fixed.prepare(modules["tower"], like, sets, graphs)

    def encode(self, modules: Any, items: Sequence[Item], outputs: frozenset[str]) -> list[TowerOutput]:
        """All tiles of all images in one pass."""
        layouts = [self.layout(item.inputs["image_sizes"]) for item in items]
        counts = [1 + layout.tiles[0] * layout.tiles[1] for layout in layouts]
        # tiles behind an image's own are padding of the image processor's batch
        pixels = torch.cat(
            [item.inputs["pixel_values"][:count] for item, count in zip(items, counts, strict=True)]
        )
        hidden, extra = self._fixed.run(modules["tower"], pixels, outputs & _ATTENTIONS)
        states = hidden.split(counts)
        extras = [
            {name: values.split(counts)[i] for name, values in extra.items()} for i in range(len(items))
        ]
        return [
            self._output(modules, layout, rows, more)
            for layout, rows, more in zip(layouts, states, extras, strict=True)
        ]

    def _output(
        self, modules: Any, layout: Layout, hidden: Tensor, extra: Mapping[str, Tensor]
    ) -> TowerOutput:
        """Of one image, from its tiles' hidden states [tiles, 1 + P, D] and attentions [tiles, L, P]."""
        patches = self.features(modules, hidden[:, self._first :])
        numbers = [0, *(1 + tile for tile, _, _ in layout.bands)]
        attentions: dict[str, Any] = {
            name: self._units(layout, values.transpose(1, 2)).T.contiguous() for name, values in extra.items()
        }
        return TowerOutput(
            patches=self._units(layout, patches),
            views=layout.views,
            cls=hidden[numbers, 0].clone() if "cls" in self.outputs else None,
            **attentions,
        )

    def _units(self, layout: Layout, values: Tensor) -> Tensor:
        """[N, C] of the units, view after view, from values [tiles, P, C] of all tiles' patches."""
        rows, columns = layout.tiles
        large = values[1:].view(rows, columns, layout.side, layout.side, -1).permute(0, 2, 1, 3, 4)
        large = large.reshape(rows * layout.side, columns * layout.side, -1)
        top, left, height, width = layout.inside
        large = large[top : top + height, left : left + width]
        if layout.grid != (height, width):
            resized = F.interpolate(large.permute(2, 0, 1)[None], list(layout.grid), mode="bilinear")
            large = resized[0].permute(1, 2, 0)
        return torch.cat((values[0], large.flatten(0, 1)[layout.order.to(values.device)]))

    @abstractmethod
    def features(self, modules: Any, patches: Tensor) -> Tensor:
        """What is packed, from hidden states [tiles, P, D]."""

    @abstractmethod
    def embeddings(self, modules: Any, tokens: Tensor) -> Tensor:
        """[k, E] of packed tokens."""

    def project(self, modules: Any, images: Sequence[Kept]) -> list[Projected]:
        """What stays, and every newline."""
        rows = self.embeddings(modules, torch.cat([kept.tokens for kept in images]))
        projected = []
        for part, kept in zip(rows.split([k.tokens.shape[0] for k in images]), images, strict=True):
            units, fixed = self.places_in(kept.output)
            newlines = modules.image_newline.expand(len(fixed), -1)
            places, order = torch.cat((units[kept.units.cpu()], fixed)).sort()
            projected.append((torch.cat((part, newlines))[order.to(part.device)], places))
        return projected

    def of_units(self, output: TowerOutput, embeddings: Tensor) -> Tensor:
        """Without newlines, view after view."""
        places, _ = self.places_in(output)
        return embeddings[places.to(embeddings.device)]

    def places_in(self, output: TowerOutput) -> tuple[Tensor, Tensor]:
        """[N] the places of an image's units, and those of its newlines."""
        layout = self.layout(output.on_host["image_sizes"])
        return layout.places, layout.newlines

    def layout(self, image_size: Tensor) -> Layout:
        """Of a picture of (height, width) pixels."""
        size = [int(pixels) for pixels in image_size.tolist()]
        tiles = get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        rows, columns = (int(count) for count in tiles)
        # transformers' own unpadding, run on coordinates
        coordinates = torch.stack(
            torch.meshgrid(torch.arange(rows * self._side), torch.arange(columns * self._side), indexing="ij")
        )
        inside = unpad_image(coordinates, size)
        height, width = inside.shape[1:]
        top, left = inside[:, 0, 0].tolist() if height and width else (0, 0)
        window = (top, left, height, width)
        grid = height, width
        if self.most_tiles is not None:
            ratio = math.sqrt(height * width / (self.most_tiles * self._side**2))
            if ratio > 1.1:
                grid = int(height // ratio), int(width // ratio)
        return Layout(self._side, (rows, columns), window, grid)

    def patches(self, item: Item) -> int:
        """Those of all tiles."""
        rows, columns = self.layout(item.inputs["image_sizes"]).tiles
        return (1 + rows * columns) * (self._first + self._side**2)

    def unpruned_grid(self) -> None:
        """It depends on the picture."""

    def crops(
        self, size: tuple[int, int], image_processor: Any, output: TowerOutput
    ) -> list[dict[str, float]]:
        """The whole picture, then each tile's part of it."""
        layout = self.layout(output.on_host["image_sizes"])
        rows, columns = layout.grid
        return [
            WHOLE,
            *(
                {
                    "left": across.start / columns,
                    "top": down.start / rows,
                    "width": (across.stop - across.start) / columns,
                    "height": (down.stop - down.start) / rows,
                }
                for _, down, across in layout.bands
            ),
        ]


class LlavaNext(AnyRes):
    """A unit is a patch before the projector: only kept ones are projected."""

    projector = LlavaNextMultiModalProjector

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.clip_units = has_cls(config)

    def check(self) -> None:
        """Without CLS in the language model, which would not fit a tile's grid."""
        super().check()
        if self._first and self.config.vision_feature_select_strategy != "default":
            raise CheckpointError(
                "vision_feature_select_strategy must be 'default': LLaVA-NeXT's tiles hold patches only."
            )

    def features(self, modules: Any, patches: Tensor) -> Tensor:
        """The hidden states."""
        return patches

    def embeddings(self, modules: Any, tokens: Tensor) -> Tensor:
        """Projected."""
        projected: Tensor = modules["projector"](tokens)
        return projected


#: Frames of a video that one pass takes.
_MOST_FRAMES = 16


class LlavaOnevision(AnyRes):
    """A unit is an embedding: large pictures are shrunk behind the projector, across patches and tiles."""

    projector = LlavaOnevisionMultiModalProjector
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    most_tiles = 9

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # CLS and embeddings are of different spaces
        self.outputs = self.outputs - {"cls"}
        self.default_score = "received"

    def features(self, modules: Any, patches: Tensor) -> Tensor:
        """Projected."""
        projected: Tensor = modules["projector"](patches)
        return projected

    def embeddings(self, modules: Any, tokens: Tensor) -> Tensor:
        """As they are."""
        return tokens

    def encode(self, modules: Any, items: Sequence[Item], outputs: frozenset[str]) -> list[TowerOutput]:
        """All tiles of all pictures in one pass, then the videos."""
        pictures = [item for item in items if item.modality == "image"]
        found = iter(super().encode(modules, pictures, outputs) if pictures else ())
        return [
            next(found) if item.modality == "image" else self._encode_video(modules, item, outputs)
            for item in items
        ]

    def _encode_video(self, modules: Any, item: Item, outputs: frozenset[str]) -> TowerOutput:
        patches: list[Tensor] = []
        attentions: dict[str, list[Tensor]] = {}
        for frames in item.inputs["pixel_values_videos"].split(_MOST_FRAMES):
            hidden, extra = self._fixed.run(modules["tower"], frames, outputs & _ATTENTIONS)
            patches.append(self._halved(self.features(modules, hidden[:, self._first :])))
            for name, values in extra.items():  # [frames, L, P]
                attentions.setdefault(name, []).append(self._halved(values.transpose(1, 2)))
        units = torch.cat(patches)  # [frames, units, E]
        side = math.ceil(self._side / 2)
        extra_outputs: dict[str, Any] = {
            name: torch.cat(v).flatten(0, 1).T.contiguous() for name, v in attentions.items()
        }
        return TowerOutput(
            patches=units.flatten(0, 1),
            views=tuple(View((side, side), frame * side**2) for frame in range(len(units))),
            **extra_outputs,
        )

    def _halved(self, values: Tensor) -> Tensor:
        """[frames, units, C] of values [frames, P, C], as transformers' `apply_pooling`."""
        rows = values.unflatten(1, (self._side, self._side)).permute(0, 3, 1, 2).contiguous()
        side = math.ceil(self._side / 2)
        return F.interpolate(rows, [side, side], mode="bilinear").flatten(2).transpose(1, 2)

    def places_in(self, output: TowerOutput) -> tuple[Tensor, Tensor]:
        """A video's newline stands behind its last frame."""
        if output.modality == "image":
            return super().places_in(output)
        units = output.patches.shape[0]
        return torch.arange(units), torch.tensor([units])

    def patches(self, item: Item) -> int:
        """Those of all tiles, or frames."""
        if item.modality == "image":
            return super().patches(item)
        return len(item.inputs["pixel_values_videos"]) * (self._first + self._side**2)
