# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL, Qwen3-VL and Qwen3.5, dense and mixture of experts: pictures and videos of any size.

A unit is 2x2 patches. A frame of a video is two sampled pictures, and attends to itself alone.

A unit's score is the mean of its patches' received attention, read in layers whose attention spans the whole
picture: in a windowed layer every window's columns sum to its own queries, so windows do not compare.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.vision_utils import get_vision_window_index

from vllm_vtprune.families.base import Family, Item, Kept, Projected, TowerOutput, View
from vllm_vtprune.vision.attention import READABLE, read_layers, reading
from vllm_vtprune.vision.memory import VIDEO_PATCHES

#: Patches of a video that one pass takes; a pass of pictures holds as many by default (`vision.memory`).
_MOST_PATCHES = VIDEO_PATCHES


class QwenVL(Family):
    """What both generations share."""

    prefixes: ClassVar[Mapping[str, str]] = {"visual.": ""}
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")

    def check(self) -> None:
        """Every configuration of these classes works."""

    def readable_layers(self) -> Sequence[int]:
        """The layers that attend over the whole picture; none names all of them."""
        return ()

    @abstractmethod
    def units(self, modules: Any, output: Any) -> Tensor:
        """[all units, D] out of what the tower returns, in the tower's order."""

    def prompt_order(self, grid: Tensor) -> Tensor:
        """[all units]: where in the tower's order each unit of the prompt's is."""
        return torch.arange(int(grid.prod(-1).sum()) // self._merge**2, device=grid.device)

    @property
    def _vision(self) -> Any:
        return self.config.vision_config

    @property
    def _merge(self) -> int:
        return int(self._vision.spatial_merge_size)

    def encode(self, modules: Any, items: Sequence[Item], outputs: frozenset[str]) -> list[TowerOutput]:
        """All images in one pass, each frame attending to itself; a long video some frames at a time."""
        short = [item for item in items if not self._is_long(item)]
        together = self._run(modules, [_patches(item) for item in short], outputs) if short else []
        passes = iter(together)
        found = []
        for item in items:
            if self._is_long(item):
                parts = [self._run(modules, [part], outputs)[0] for part in self._parts(item)]
                units = torch.cat([rows for rows, _ in parts])
                names = parts[0][1]
                received: dict[str, Any] = {
                    name: torch.cat([scores[name] for _, scores in parts], dim=1) for name in names
                }
            else:
                units, received = next(passes)
            found.append(TowerOutput(patches=units, views=self._views(item), **received))
        return found

    def _run(
        self, modules: Any, media: Sequence[tuple[Tensor, Tensor]], outputs: frozenset[str]
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """Units [N, D] and by name the attention [1, N] they receive, of each grid [3] with its pixels."""
        grid = torch.stack([grid for grid, _ in media])  # [B, 3]
        layers = read_layers(outputs, len(modules.blocks), self.readable_layers())
        with reading({name: modules.blocks[layer].attn for name, layer in layers.items()}) as seen:
            result = modules(torch.cat([pixels for _, pixels in media]), grid_thw=grid)
        order = self.prompt_order(grid)
        sizes = (grid.prod(-1) // self._merge**2).tolist()
        units = self.units(modules, result)[order].split(sizes)
        received: list[dict[str, Any]] = [{} for _ in media]
        for name, calls in seen.items():  # one call a frame: [1, patches]
            scores = torch.cat(calls, dim=1).view(1, -1, self._merge**2).mean(-1)[:, order]
            for of_one, attention in zip(received, scores.split(sizes, dim=1), strict=True):
                of_one[name] = attention.clone()
        return [(rows.clone(), of_one) for rows, of_one in zip(units, received, strict=True)]

    def _is_long(self, item: Item) -> bool:
        return item.modality == "video" and self.patches(item) > _MOST_PATCHES

    def _parts(self, item: Item) -> list[tuple[Tensor, Tensor]]:
        """A video's frames in runs as long as a pass takes."""
        grid, pixels = _patches(item)
        frames, frame = int(grid[0]), int(grid[1:].prod())
        runs = torch.arange(frames).split(max(1, _MOST_PATCHES // frame))
        grids = [torch.cat((grid.new_tensor([len(run)]), grid[1:])) for run in runs]
        return list(zip(grids, pixels.split([len(run) * frame for run in runs]), strict=True))

    def _views(self, item: Item) -> tuple[View, ...]:
        """The picture, or each frame."""
        frames, rows, columns = self._grid_of(item.inputs)
        return tuple(View((rows, columns), frame * rows * columns) for frame in range(frames))

    def patches(self, item: Item) -> int:
        """As many as the picture has, or all frames of the video."""
        return int(_patches(item)[0].prod())

    def unpruned_grid(self) -> None:
        """It depends on the picture."""

    def advance(self, on_host: Mapping[str, Tensor]) -> int:
        """The longest side: the text behind a picture goes on there (M-RoPE), and behind each frame."""
        frames, rows, columns = self._grid_of(on_host)
        return frames * max(rows, columns)

    def table(self, max_model_len: int) -> int:
        """Four times the longest prompt that the configuration names, as vLLM's `MRotaryEmbedding` has it."""
        return 4 * int(self.config.get_text_config().max_position_embeddings)

    def _grid_of(self, fields: Mapping[str, Tensor]) -> tuple[int, int, int]:
        """Frames, and rows and columns of a frame's units."""
        frames, rows, columns = _grid(fields).tolist()
        return frames, rows // self._merge, columns // self._merge


def _grid(fields: Mapping[str, Tensor]) -> Tensor:
    """[3]: frames, and rows and columns of a frame's patches."""
    return fields["video_grid_thw" if "video_grid_thw" in fields else "image_grid_thw"]


def _patches(item: Item) -> tuple[Tensor, Tensor]:
    """Grid [3] and pixels of all patches."""
    name = "pixel_values_videos" if item.modality == "video" else "pixel_values"
    return _grid(item.inputs), item.inputs[name]


class Qwen2_5VL(QwenVL):
    """A unit is what the merger takes, [4 * hidden]; only kept ones are merged."""

    def build(self) -> nn.Module:
        """The tower with its merger."""
        tower: nn.Module = Qwen2_5_VisionTransformerPretrainedModel._from_config(
            self._vision, attn_implementation=READABLE
        )
        return tower

    def readable_layers(self) -> Sequence[int]:
        """Those without windows."""
        return sorted(self._vision.fullatt_block_indexes)

    def units(self, modules: Any, output: Any) -> Tensor:
        """Before the merger, whose result is in the prompt's order already, and thrown away."""
        rows: Tensor = output.last_hidden_state
        return rows.view(-1, self._merge**2 * rows.shape[-1])

    def prompt_order(self, grid: Tensor) -> Tensor:
        """Inside the tower the units stand window by window."""
        windows, _ = get_vision_window_index(
            grid,
            spatial_merge_size=self._merge,
            window_size=self._vision.window_size,
            patch_size=self._vision.patch_size,
        )
        return windows.argsort()

    def advance(self, on_host: Mapping[str, Tensor]) -> int:
        """The longest side of picture or video, time in `tokens_per_second` (vLLM's own positions)."""
        frames, rows, columns = self._grid_of(on_host)
        step = float(on_host.get("second_per_grid_ts", 1.0)) * self._vision.tokens_per_second
        return max(int((frames - 1) * step) + 1, rows, columns)

    def project(self, modules: Any, images: Sequence[Kept]) -> list[Projected]:
        """Merge what stays."""
        rows = torch.cat([kept.tokens for kept in images])
        merged = modules.merger(rows.view(-1, self._vision.hidden_size))
        embeddings = merged.split([kept.tokens.shape[0] for kept in images])
        return [(e, kept.units) for e, kept in zip(embeddings, images, strict=True)]


class Qwen3VL(QwenVL):
    """A unit is a final embedding and its deepstack levels, [hidden * (1 + levels)].

    That is smaller than the states before the mergers, which are a tenth of the tower.
    """

    # its video processor refuses fewer (transformers' `smart_resize`)
    fewest_frames: ClassVar[int] = 2

    def build(self) -> nn.Module:
        """The tower with its mergers."""
        tower: nn.Module = Qwen3VLVisionModel._from_config(self._vision, attn_implementation=READABLE)
        return tower

    def units(self, modules: Any, output: Any) -> Tensor:
        """As `Qwen3VLModel.get_image_features` gives them, side by side."""
        return torch.cat([output.pooler_output, *output.deepstack_features], dim=-1)

    def project(self, modules: Any, images: Sequence[Kept]) -> list[Projected]:
        """They are projected already."""
        return [(kept.tokens, kept.units) for kept in images]

    def table(self, max_model_len: int) -> int:
        """As `models.qwen_vl` sizes it."""
        longest = int(self.config.get_text_config().max_position_embeddings)
        return longest * self.table_factor(max_model_len, longest)

    @staticmethod
    def table_factor(max_model_len: int, max_position_embeddings: int) -> int:
        """Rotary table in longest prompts: the larger one only where the smaller leaves no room for gaps."""
        return 1 if 2 * max_model_len <= max_position_embeddings else 4

    def embed_width(self) -> int:
        """The embedding and its levels, which vLLM takes apart again."""
        return super().embed_width() * (1 + len(self._vision.deepstack_visual_indexes))


class Qwen3_5(Qwen3VL):
    """Qwen3.5 and 3.6: Qwen3-VL's tower without deepstack levels, before a hybrid decoder."""

    def build(self) -> nn.Module:
        """The tower with its merger."""
        tower: nn.Module = Qwen3_5VisionModel._from_config(self._vision, attn_implementation=READABLE)
        return tower

    def units(self, modules: Any, output: Any) -> Tensor:
        """As `Qwen3_5Model.get_image_features` gives them."""
        rows: Tensor = output.pooler_output
        return rows

    def embed_width(self) -> int:
        """The embedding alone."""
        return int(self.config.get_text_config().hidden_size)
