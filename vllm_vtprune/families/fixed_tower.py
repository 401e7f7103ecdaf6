# SPDX-License-Identifier: Apache-2.0
"""CLIP towers: square pictures of one size, traced, with the attention recomputed that kernels do not return.

The tower runs up to the feature layer only (`vision_feature_layer`), as vLLM's own LLaVA does
(`vllm.model_executor.models.llava.init_vision_tower_for_llava`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.vision.tower_pass import TowerPass, tower_pass


def clip_config(config: Any) -> CLIPVisionConfig:
    """The tower's configuration.

    Raises:
        CheckpointError: the tower is not a CLIP tower.
    """
    vision = config.vision_config
    if not isinstance(vision, CLIPVisionConfig):
        raise CheckpointError(
            "vtprune supports LLaVA checkpoints with a CLIP vision tower; this one has "
            f"{getattr(vision, 'model_type', 'none')!r}. Serve a CLIP-based LLaVA, or set VLLM_PLUGINS='' to "
            "run without vtprune."
        )
    return vision


def patch_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches in one image.

    Raises:
        CheckpointError: the tower is not a CLIP tower, or takes pictures that are not square.
    """
    vision = clip_config(config)
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise CheckpointError(
            f"image_size {vision.image_size} and patch_size {vision.patch_size} must be single numbers: "
            "vtprune supports CLIP towers for square pictures."
        )
    side = vision.image_size // vision.patch_size
    return side, side


def feature_layer_index(config: Any) -> int:
    """Number of encoder layers to run, so that the last one's output is the feature layer's.

    Raises:
        CheckpointError: the configuration asks for several feature layers, or one that does not exist.
    """
    layer = config.vision_feature_layer
    depth = clip_config(config).num_hidden_layers
    if not isinstance(layer, int):
        raise CheckpointError(
            f"vision_feature_layer is {layer}: vtprune supports one feature layer, a single number."
        )
    # hidden_states[0] is the embedding's output, hidden_states[i] that of layer i - 1
    index = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= index <= depth:
        raise CheckpointError(f"vision_feature_layer {layer} does not exist in a tower of {depth} layers.")
    return index


def build_tower(config: Any) -> CLIPVisionModel:
    """The tower's layers up to the feature layer, with random weights."""
    layers = feature_layer_index(config)
    vision = CLIPVisionConfig.from_dict({**clip_config(config).to_dict(), "num_hidden_layers": layers})
    vision._attn_implementation = "sdpa"
    return CLIPVisionModel(vision)


class FixedTower:
    """Runs a tower whose pictures all have one size; one pass at a time, as `tower_pass` asks."""

    def __init__(self, config: Any) -> None:
        self._heads = clip_config(config).num_attention_heads
        self._passes: dict[bool, TowerPass] = {}

    def run(
        self, tower: CLIPVisionModel, pixel_values: Tensor, outputs: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states of the feature layer [B, 1 + N, D], CLS first, and the optional outputs by name.

        Args:
            tower: the same one each time.
            pixel_values: [B, 3, H, W].
            outputs: of `OPTIONAL_OUTPUTS`.
        """
        wanted = bool(outputs)
        if wanted not in self._passes:
            self._passes[wanted] = tower_pass(tower, pixel_values[:1], projections=wanted)
        hidden, *projections = self._passes[wanted](pixel_values)
        queries, keys = projections[::2], projections[1::2]
        extra: dict[str, Tensor] = {}
        if "keys" in outputs:
            extra["keys"] = keys[-1][:, 1:]
        if "cls_attention" in outputs:
            extra["cls_attention"] = self._attentions(queries, keys, cls_only=True)
        if "received" in outputs:
            extra["received"] = self._attentions(queries, keys, cls_only=False)
        return hidden, extra

    def _attentions(self, queries: list[Tensor], keys: list[Tensor], *, cls_only: bool) -> Tensor:
        """[B, L, N]: attention each patch gets in each layer.

        Recomputed in float32 from each layer's projections, [B, 1 + N, D]: flash and SDPA kernels return no
        weights, and one extra softmax row per head is cheap.
        """
        layers = zip(queries, keys, strict=True)
        rows = [_attention(q.float(), k.float(), self._heads, cls_only=cls_only) for q, k in layers]
        return torch.stack(rows, dim=1)


def _attention(queries: Tensor, keys: Tensor, heads: int, *, cls_only: bool) -> Tensor:
    """[B, N]: attention each patch gets, mean over heads, from CLS or from all queries."""
    if cls_only:
        queries = queries[:, :1]
    batch, tokens, width = keys.shape
    queries = queries.view(batch, -1, heads, width // heads).transpose(1, 2)
    keys = keys.view(batch, tokens, heads, width // heads).transpose(1, 2)
    weights = torch.softmax(queries @ keys.transpose(-1, -2) * (width // heads) ** -0.5, dim=-1)
    return weights.mean((1, 2))[:, 1:]
