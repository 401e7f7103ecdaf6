# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP towers: square pictures of one size, traced, with the attention they do not return.

The tower runs up to the feature layer only (`vision_feature_layer`), as vLLM's own LLaVA does
(`vllm.model_executor.models.llava.init_vision_tower_for_llava`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.vision.tower_pass import TowerPass, tower_pass


def tower_config(config: Any) -> CLIPVisionConfig | SiglipVisionConfig:
    """The tower's configuration.

    Raises:
        CheckpointError: the tower is neither a CLIP nor a SigLIP tower, or the language model would be given
            what the tower does not have.
    """
    vision = config.vision_config
    if not isinstance(vision, CLIPVisionConfig | SiglipVisionConfig):
        raise CheckpointError(
            "vtprune supports LLaVA checkpoints with a CLIP or SigLIP vision tower; this one has "
            f"{getattr(vision, 'model_type', 'none')!r}. Serve such a LLaVA, or set VLLM_PLUGINS='' to run "
            "without vtprune."
        )
    if isinstance(vision, SiglipVisionConfig) and config.vision_feature_select_strategy != "full":
        raise CheckpointError(
            f"vision_feature_select_strategy is {config.vision_feature_select_strategy!r}; it must be 'full' "
            "for a SigLIP tower, which has no CLS token to leave out."
        )
    return vision


def has_cls(config: Any) -> bool:
    """Whether the tower has a CLS token, ahead of the patches."""
    return isinstance(config.vision_config, CLIPVisionConfig)


def tower_outputs(config: Any) -> frozenset[str]:
    """`Family.outputs` of such a tower."""
    return frozenset({"received", "keys"} | ({"cls", "cls_attention"} if has_cls(config) else set()))


def patch_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches in one picture, or tile.

    Raises:
        CheckpointError: as `tower_config`, and for a tower that takes pictures that are not square.
    """
    vision = tower_config(config)
    if not isinstance(vision.image_size, int) or not isinstance(vision.patch_size, int):
        raise CheckpointError(
            f"image_size {vision.image_size} and patch_size {vision.patch_size} must be single numbers: "
            "vtprune supports towers for square pictures."
        )
    side = vision.image_size // vision.patch_size
    return side, side


def feature_layer_index(config: Any) -> int:
    """Number of encoder layers to run, so that the last one's output is the feature layer's.

    Raises:
        CheckpointError: the configuration asks for several feature layers, or one that does not exist.
    """
    layer = config.vision_feature_layer
    depth = tower_config(config).num_hidden_layers
    if not isinstance(layer, int):
        raise CheckpointError(
            f"vision_feature_layer is {layer}: vtprune supports one feature layer, a single number."
        )
    # hidden_states[0] is the embedding's output, hidden_states[i] that of layer i - 1
    index = layer if layer >= 0 else depth + 1 + layer
    if not 1 <= index <= depth:
        raise CheckpointError(f"vision_feature_layer {layer} does not exist in a tower of {depth} layers.")
    return index


def build_tower(config: Any) -> CLIPVisionModel | SiglipVisionModel:
    """The tower's layers up to the feature layer, with random weights."""
    vision, layers = tower_config(config), feature_layer_index(config)
    cut = {**vision.to_dict(), "num_hidden_layers": layers}
    if isinstance(vision, CLIPVisionConfig):
        clip = CLIPVisionConfig.from_dict(cut)
        clip._attn_implementation = "sdpa"
        return CLIPVisionModel(clip)
    siglip = SiglipVisionConfig.from_dict({**cut, "vision_use_head": False})
    siglip._attn_implementation = "sdpa"
    tower = SiglipVisionModel(siglip)
    # the feature layer's states go to the projector as they are
    tower.post_layernorm = nn.Identity()  # type: ignore[assignment]
    return tower


class FixedTower:
    """Runs a tower whose pictures all have one size; one pass at a time, as `tower_pass` asks."""

    def __init__(self, config: Any) -> None:
        self._heads = tower_config(config).num_attention_heads
        self._first = int(has_cls(config))
        self._passes: dict[bool, TowerPass] = {}

    def run(
        self, tower: nn.Module, pixel_values: Tensor, outputs: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states of the feature layer [B, N, D], CLS first where there is one; the optional outputs.

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
            extra["keys"] = keys[-1][:, self._first :]
        if "cls_attention" in outputs:
            extra["cls_attention"] = self._attentions(queries, keys, cls_only=True)
        if "received" in outputs:
            extra["received"] = self._attentions(queries, keys, cls_only=False)
        return hidden, extra

    def _attentions(self, queries: list[Tensor], keys: list[Tensor], *, cls_only: bool) -> Tensor:
        """[B, L, N]: attention each patch gets in each layer.

        Recomputed in float32 from each layer's projections, [B, N, D] and CLS: flash and SDPA kernels give no
        weights, and one extra softmax row per head is cheap.
        """
        layers = zip(queries, keys, strict=True)
        rows = [_attention(q.float(), k.float(), self._heads, cls_only=cls_only) for q, k in layers]
        return torch.stack(rows, dim=1)[:, :, self._first :]


def _attention(queries: Tensor, keys: Tensor, heads: int, *, cls_only: bool) -> Tensor:
    """[B, N]: attention each token gets, mean over heads, from the first or from all queries."""
    if cls_only:
        queries = queries[:, :1]
    batch, tokens, width = keys.shape
    queries = queries.view(batch, -1, heads, width // heads).transpose(1, 2)
    keys = keys.view(batch, tokens, heads, width // heads).transpose(1, 2)
    weights = torch.softmax(queries @ keys.transpose(-1, -2) * (width // heads) ** -0.5, dim=-1)
    return weights.mean((1, 2))
