# SPDX-License-Identifier: Apache-2.0
"""CLIP and SigLIP towers: square pictures of one size, with the attention that they do not return.

The tower runs up to the feature layer only (`vision_feature_layer`), as vLLM's own LLaVA does
(`vllm.model_executor.models.llava.init_vision_tower_for_llava`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.families.base import RECEIVED
from vllm_vtprune.vision.attention import read_layers
from vllm_vtprune.vision.captured import Graphs
from vllm_vtprune.vision.tower_pass import TowerPasses


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
    return RECEIVED | {"keys"} | ({"cls", "cls_attention"} if has_cls(config) else set())


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
    """Runs a tower whose pictures all have one size; one pass at a time, as `TowerPasses` asks."""

    def __init__(self, config: Any) -> None:
        vision = tower_config(config)
        self._heads = vision.num_attention_heads
        self._size: Any = vision.image_size
        self._first = int(has_cls(config))
        self._passes = TowerPasses(self._pass)

    def prepare(
        self, tower: nn.Module, like: Tensor, sets: Collection[frozenset[str]], graphs: Graphs | None
    ) -> None:
        """Make the passes for some sets of optional outputs.

        Args:
            tower: the one that `run` will be given.
            like: any tensor on its device and in its dtype.
            sets: of `OPTIONAL_OUTPUTS`.
            graphs: how to capture them; None: not.
        """
        self._passes.prepare(tower, like.new_zeros((1, 3, self._size, self._size)), sets, graphs)

    def run(
        self, tower: nn.Module, pixel_values: Tensor, outputs: frozenset[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states of the feature layer [B, N, D], CLS first where there is one; the optional outputs.

        Args:
            tower: the same one each time.
            pixel_values: [B, 3, H, W].
            outputs: of `OPTIONAL_OUTPUTS`.
        """
        hidden, *extra = self._passes(tower, pixel_values, outputs)
        return hidden, dict(zip(sorted(outputs), extra, strict=True))

    def _pass(self, tower: nn.Module, outputs: frozenset[str], pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Hidden states, and the optional outputs in the order of their names.

        A layer's attention is recomputed in float32 as soon as its projections, [B, N, D] and CLS, are there:
        flash and SDPA kernels give no weights, and all layers' projections together take more memory than
        the pass.
        """
        encoder: Any = tower.encoder
        attentions = [layer.self_attn for layer in encoder.layers]
        rows: dict[str, list[Tensor]] = {name: [] for name in outputs}
        queries: list[Tensor] = []

        def read(names: frozenset[str], keys: Tensor) -> None:
            (query,) = queries
            queries.clear()
            for name in names - {"keys"}:
                first_only = name == "cls_attention"
                rows[name].append(_attention(query.float(), keys.float(), self._heads, cls_only=first_only))
            if "keys" in names:
                rows["keys"].append(keys)

        handles = []
        for layer, names in self._read_in(outputs, len(attentions)).items():
            attention = attentions[layer]
            # transformers projects the queries first
            handles.append(attention.q_proj.register_forward_hook(lambda _m, _a, q: queries.append(q)))
            handles.append(attention.k_proj.register_forward_hook(lambda _m, _a, k, n=names: read(n, k)))
        try:
            hidden = tower(pixel_values).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        extra = {
            name: found[0][:, self._first :] if name == "keys" else torch.stack(found, 1)[:, :, self._first :]
            for name, found in rows.items()
        }
        return (hidden, *(extra[name] for name in sorted(extra)))

    @staticmethod
    def _read_in(outputs: frozenset[str], depth: int) -> dict[int, frozenset[str]]:
        """The outputs that are read in each layer where there are any."""
        once = read_layers(outputs, depth) | {name: depth - 1 for name in outputs & {"keys"}}
        everywhere = outputs & {"cls_attention"}
        read = {
            layer: everywhere | {name for name, at in once.items() if at == layer} for layer in range(depth)
        }
        return {layer: names for layer, names in read.items() if names}


def _attention(queries: Tensor, keys: Tensor, heads: int, *, cls_only: bool) -> Tensor:
    """[B, N]: attention each token gets, mean over heads, from the first or from all queries, [B, N, D]."""
    if cls_only:
        queries = queries[:, :1]
    queries, keys = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (queries, keys))
    size = int(keys.shape[-1])
    weights = torch.softmax(queries @ keys.transpose(-1, -2) * size**-0.5, dim=-1)
    return weights.mean((1, 2))
