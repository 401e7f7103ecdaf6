# SPDX-License-Identifier: Apache-2.0
"""InternVL 3 and 3.5, Hugging Face and chat format: tiles and a thumbnail, units of 2x2 patches.

Its CLS token is dropped before the projector and the tower is trained with mean pooling, so nothing taught it
to say what matters: the score is the attention that units receive.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import InternVLConfig, InternVLVisionConfig
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.internvl.modeling_internvl import (
    InternVLModel,
    InternVLMultiModalProjector,
    InternVLVisionModel,
)

from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.families.base import RECEIVED, WHOLE, Family, Item, Kept, Projected, TowerOutput, View
from vllm_vtprune.families.llava import with_added
from vllm_vtprune.vision.attention import READABLE, read_layers, reading
from vllm_vtprune.vision.captured import Graphs
from vllm_vtprune.vision.tower_pass import TowerPasses


class InternVL(Family):
    """A unit is what the projector takes, [4 * hidden]; only kept ones are projected."""

    prefixes: ClassVar[Mapping[str, str]] = {
        "vision_tower.": "tower.",
        "multi_modal_projector.": "projector.",
    }
    adds_tokens = True
    captures = True
    #: The image processor's output with an image's tiles, [tiles, 3, H, W].
    pixels: ClassVar[str] = "pixel_values"

    def check(self) -> None:
        """Square tiles, halved by pixel shuffle, and the last layer, all that vLLM's own class knows."""
        vision = self.config.vision_config
        rows, columns = (
            size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        factor = round(1 / self.config.downsample_ratio)
        if rows != columns or rows % factor:
            raise CheckpointError(
                f"tiles of {rows}x{columns} patches do not divide into squares of {factor}x{factor}."
            )
        layer, strategy = self.config.vision_feature_layer, self.config.vision_feature_select_strategy
        if layer != -1 or strategy != "default":
            raise CheckpointError(
                f"vision_feature_layer {layer} and vision_feature_select_strategy {strategy!r}: vtprune "
                "supports InternVL with -1 and 'default', as it is published."
            )
        self._side, self._factor = rows, factor
        # untraced: attention is read in parts of the batch's size (`received_attention`)
        self._passes = TowerPasses(self._pass, traced=False)

    def build(self) -> nn.Module:
        """`tower` and `projector`."""
        tower = InternVLVisionModel._from_config(self.config.vision_config, attn_implementation=READABLE)
        return nn.ModuleDict({"tower": tower, "projector": InternVLMultiModalProjector(self.config)})

    def warm_up(
        self, modules: Any, like: Tensor, sets: Collection[frozenset[str]], graphs: Graphs | None
    ) -> None:
        """Capture the tower."""
        rows, columns = self.config.vision_config.image_size
        self._passes.prepare(modules["tower"], like.new_zeros((1, 3, rows, columns)), sets, graphs)

    def _pass(self, tower: Any, outputs: frozenset[str], pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Units [tiles, units, 4 * hidden], and the attentions they receive [tiles, units] by their names."""
        layers = read_layers(outputs, len(tower.encoder.layer))
        with reading({name: tower.encoder.layer[layer].attention for name, layer in layers.items()}) as seen:
            hidden = tower(pixel_values).last_hidden_state
        scores = [self._shuffled(seen[name][0][:, 1:, None]) for name in sorted(seen)]  # [tiles, units, 4]
        return (self._shuffled(hidden[:, 1:]), *(score.mean(-1) for score in scores))

    def encode(self, modules: Any, items: Sequence[Item], outputs: frozenset[str]) -> list[TowerOutput]:
        """All tiles of all images in one pass."""
        counts = [item.inputs[self.pixels].shape[0] for item in items]
        pixels = torch.cat([item.inputs[self.pixels] for item in items])
        wanted = outputs & RECEIVED
        units, *scores = self._passes(modules["tower"], pixels, wanted)
        received: dict[str, Any] = dict(zip(sorted(wanted), scores, strict=True))
        side, start, found = self._side // self._factor, 0, []
        for count in counts:
            tiles = slice(start, start + count)
            start += count
            found.append(
                TowerOutput(
                    patches=units[tiles].flatten(0, 1).clone(),
                    views=tuple(View((side, side), tile * side**2) for tile in range(count)),
                    **{name: values[tiles].flatten()[None].clone() for name, values in received.items()},
                )
            )
        return found

    def _shuffled(self, values: Tensor) -> Tensor:
        """[tiles, units, factor^2 * C] of values [tiles, P, C], by transformers' own pixel shuffle."""
        square: Tensor = values.unflatten(1, (self._side, self._side))
        shuffle: Any = InternVLModel.pixel_shuffle  # which reads nothing of its model
        shuffled: Tensor = shuffle(None, square, scale_factor=1 / self._factor)
        return shuffled.flatten(1, 2)

    def project(self, modules: Any, images: Sequence[Kept]) -> list[Projected]:
        """Only the kept units; every place of a picture is alike."""
        rows = [kept.tokens for kept in images]
        embeddings = modules["projector"](torch.cat(rows)).split([r.shape[0] for r in rows])
        return [(e, with_added(kept)) for e, kept in zip(embeddings, images, strict=True)]

    def patches(self, item: Item) -> int:
        """Those of all tiles."""
        tiles: int = item.inputs[self.pixels].shape[0]
        return tiles * int(1 + self._side**2)

    def unpruned_grid(self) -> None:
        """It depends on the picture."""

    def crops(
        self, size: tuple[int, int], image_processor: Any, output: TowerOutput
    ) -> list[dict[str, float]]:
        """Each tile's part of the picture, then the thumbnail's, which is the whole."""
        if len(output.views) == 1:
            return [WHOLE]
        columns, rows = self._canvas(size, image_processor, len(output.views))
        tiles = [
            {"left": c / columns, "top": r / rows, "width": 1 / columns, "height": 1 / rows}
            for r in range(rows)
            for c in range(columns)
        ]
        return [*tiles, WHOLE][: len(output.views)]

    def _canvas(self, size: tuple[int, int], image_processor: Any, views: int) -> tuple[int, int]:
        """Columns and rows of tiles, by transformers' own rule."""
        tile = image_processor.size
        columns, rows = get_optimal_tiled_canvas(
            (size[1], size[0]),
            (tile["height"], tile["width"]),
            image_processor.min_patches,
            image_processor.max_patches,
        )
        return columns, rows


#: Names of weights in the chat format -> in transformers' modules, one after the other.
_CHAT_NAMES = [
    (r"^vision_model\.", "tower."),
    (r"\.class_embedding$", ".cls_token"),
    (r"\.patch_embedding\.", ".patch_embeddings.projection."),
    (r"\.position_embedding$", ".position_embeddings"),
    (r"\.encoder\.layers\.", ".encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.", ".attention."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"^mlp1\.0\.", "projector.layer_norm."),
    (r"^mlp1\.1\.", "projector.linear_1."),
    (r"^mlp1\.3\.", "projector.linear_2."),
]


class InternVLChat(InternVL):
    """`InternVLChatModel`: the same modules under other names, queries, keys and values in one matrix.

    What differs was read in vLLM's `internvl.InternVLChatModel` and `intern_vit.InternVisionModel`.
    """

    prefixes: ClassVar[Mapping[str, str]] = {"vision_model.": "tower.", "mlp1.": "projector."}
    pixels = "pixel_values_flat"

    def __init__(self, config: Any) -> None:
        self._chat = config
        vision, text = config.vision_config, config.text_config
        super().__init__(
            InternVLConfig(
                vision_config=InternVLVisionConfig(
                    hidden_size=vision.hidden_size,
                    num_hidden_layers=vision.num_hidden_layers,
                    num_attention_heads=vision.num_attention_heads,
                    attention_bias=vision.qkv_bias,
                    use_qk_norm=vision.qk_normalization,
                    intermediate_size=vision.intermediate_size,
                    hidden_act=vision.hidden_act,
                    norm_type=vision.norm_type,
                    layer_norm_eps=vision.layer_norm_eps,
                    image_size=vision.image_size,
                    patch_size=vision.patch_size,
                ),
                text_config=text,
                downsample_ratio=config.downsample_ratio,
                architectures=config.architectures,
            )
        )

    def check(self) -> None:
        """As it is published: the last layer, and units in raster order."""
        layer, version = self._chat.select_layer, self._chat.ps_version
        if layer != -1 or version == "v1":
            raise CheckpointError(
                f"select_layer {layer} and ps_version {version!r}: vtprune supports InternVL with -1 and "
                "'v2', as it is published."
            )
        super().check()

    def rename(self, key: str) -> str | None:
        """As the Hugging Face format has it."""
        name = key.removeprefix("model.")
        if not name.startswith(tuple(self.prefixes)):
            return None
        for pattern, new in _CHAT_NAMES:
            name = re.sub(pattern, new, name)
        return name

    def arrange(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Queries, keys and values apart."""
        arranged: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            if ".attention.qkv." not in name:
                arranged[name] = tensor
                continue
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                arranged[name.replace(".qkv.", f".{which}_proj.")] = part.contiguous()
        return arranged

    def _canvas(self, size: tuple[int, int], image_processor: Any, views: int) -> tuple[int, int]:
        """The grid of as many tiles whose shape is nearest to the picture's."""
        tiles = views - 1 if image_processor.use_thumbnail else views
        grids = [(tiles // rows, rows) for rows in range(tiles, 0, -1) if tiles % rows == 0]
        return min(grids, key=lambda grid: abs(size[0] / size[1] - grid[0] / grid[1]))
