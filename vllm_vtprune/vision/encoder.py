# SPDX-License-Identifier: Apache-2.0
"""The vision tower and the projector: pixels in, what selection needs out, kept tokens projected.

The tower runs up to the feature layer only (`vision_feature_layer`), as vLLM's own LLaVA does
(`vllm.model_executor.models.llava.init_vision_tower_for_llava`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.vision.checkpoint import load_vision_weights
from vllm_vtprune.vision.tower_pass import TowerPass, tower_pass

logger = logging.getLogger(__name__)

#: Optional outputs of the tower (fields of `selection.VisionFeatures`) that cost extra work.
OPTIONAL_OUTPUTS = frozenset({"cls_attention", "received", "keys"})


@dataclass(frozen=True, slots=True)
class TowerOutput:
    """What the tower computed for one image, apart from any request's settings.

    Attributes:
        patches: [N, D] hidden states at the feature layer, raster order.
        cls: [D] hidden state of CLS at the same layer.
        cls_attention: [L, N] head-mean attention from CLS, layers 0 .. L-1, the last is the feature layer.
        received: [L, N] attention received, mean over heads and queries.
        keys: [N, D] attention keys of the feature layer, heads concatenated.
    """

    patches: Tensor
    cls: Tensor
    cls_attention: Tensor | None = None
    received: Tensor | None = None
    keys: Tensor | None = None

    @property
    def outputs(self) -> frozenset[str]:
        """Which optional outputs are there."""
        return frozenset(name for name in OPTIONAL_OUTPUTS if getattr(self, name) is not None)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (self.patches, self.cls, self.cls_attention, self.received, self.keys)
        return sum(t.nbytes for t in tensors if t is not None)


def clip_config(config: LlavaConfig) -> CLIPVisionConfig:
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


def patch_grid(config: LlavaConfig) -> tuple[int, int]:
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


def feature_layer_index(config: LlavaConfig) -> int:
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


class VisionEncoder:
    """CLIP tower plus LLaVA projector on one device.

    One pass of the tower at a time, as `tower_pass` asks.
    """

    def __init__(
        self,
        config: LlavaConfig,
        tower: CLIPVisionModel,
        projector: LlavaMultiModalProjector,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device = device
        self.dtype = dtype
        nn.Module.to(tower, device, dtype)
        nn.Module.to(projector, device, dtype)
        self.tower = tower.eval().requires_grad_(False)
        self.projector = projector.eval().requires_grad_(False)
        self.grid = patch_grid(config)
        # "full" hands CLS to the language model too, ahead of the patches
        self.with_cls = config.vision_feature_select_strategy == "full"
        # multiply-adds of the tower's matrix products, for one image
        self.work_per_image = (1 + self.grid[0] * self.grid[1]) * sum(p.numel() for p in tower.parameters())
        self._heads = clip_config(config).num_attention_heads
        self._passes: dict[bool, TowerPass] = {}
        self._lock = threading.Lock()

    @staticmethod
    def load(
        config: LlavaConfig,
        model: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        revision: str | None = None,
        download_dir: str | None = None,
        dummy: bool = False,
    ) -> VisionEncoder:
        """Build the encoder from the same checkpoint as the engine.

        Args:
            config: the checkpoint's configuration.
            model: local folder or hub id.
            device: where tower and projector run.
            dtype: their precision.
            revision: of a hub id.
            download_dir: cache folder of the hub client.
            dummy: random weights, for vLLM's `--load-format dummy`.

        Raises:
            CheckpointError: weights are missing or have other shapes than the configuration says.
        """
        layers = feature_layer_index(config)
        vision_config = CLIPVisionConfig.from_dict(
            {**clip_config(config).to_dict(), "num_hidden_layers": layers}
        )
        vision_config._attn_implementation = "sdpa"
        with torch.device("cpu"):
            tower = CLIPVisionModel(vision_config)
            projector = LlavaMultiModalProjector(config)
        if not dummy:
            tower_weights, projector_weights = load_vision_weights(model, revision, download_dir)
            _assign(tower, tower_weights, "vision tower", layers)
            _assign(projector, projector_weights, "projector", layers)
        logger.info("vtprune: vision tower (%d layers) and projector on %s, %s", layers, device, dtype)
        encoder = VisionEncoder(config, tower, projector, device, dtype)
        size = cast(int, vision_config.image_size)  # else `patch_grid` has refused it
        # now, and not while the first request waits
        encoder._pass(torch.zeros((1, 3, size, size), device=device, dtype=dtype), projections=False)
        return encoder

    @torch.inference_mode()
    def encode(self, pixel_values: Tensor, outputs: frozenset[str] = frozenset()) -> list[TowerOutput]:
        """Run the tower.

        Args:
            pixel_values: [B, 3, H, W], preprocessed.
            outputs: the optional outputs wanted, of `OPTIONAL_OUTPUTS`.

        Returns:
            One `TowerOutput` per image, each in memory of its own, so that one can be freed without the rest.
        """
        pixel_values = pixel_values.to(self.device, self.dtype)
        with self._lock:
            hidden, *projections = self._pass(pixel_values[:1], projections=bool(outputs))(pixel_values)
        extra = _optional_outputs(projections[::2], projections[1::2], self._heads, outputs)
        return [
            TowerOutput(
                patches=hidden[i, 1:].clone(),
                cls=hidden[i, 0].clone(),
                **{name: values[i].clone() for name, values in extra.items()},
            )
            for i in range(hidden.shape[0])
        ]

    def _pass(self, example: Tensor, *, projections: bool) -> TowerPass:
        if projections not in self._passes:
            self._passes[projections] = tower_pass(self.tower, example, projections=projections)
        return self._passes[projections]

    @torch.inference_mode()
    def project(self, images: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Project the kept tokens of several images in one pass.

        Args:
            images: per image its kept tokens [k, D] and its CLS state [D].

        Returns:
            Per image the embeddings the language model is given: [k, hidden], or [1 + k, hidden] for
            checkpoints whose `vision_feature_select_strategy` is "full".
        """
        rows = [torch.cat((cls[None], kept)) if self.with_cls else kept for kept, cls in images]
        projected = self.projector(torch.cat(rows).to(self.device, self.dtype))
        return list(projected.split([row.shape[0] for row in rows]))


def _assign(module: nn.Module, weights: dict[str, Tensor], what: str, layers: int) -> None:
    wanted = module.state_dict()
    # layers above the feature layer are in the file and not needed; position ids are a buffer of old files
    given = {name: tensor for name, tensor in weights.items() if name in wanted}
    missing = [name for name in wanted if name not in given and not name.endswith("position_ids")]
    if missing:
        raise CheckpointError(
            f"The checkpoint lacks {len(missing)} weights of the {what} (first: {missing[0]}); "
            f"vtprune supports CLIP towers, here with {layers} layers up to the feature layer."
        )
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            raise CheckpointError(
                f"{name} of the {what} has shape {tuple(tensor.shape)}, the configuration says "
                f"{tuple(wanted[name].shape)}: config.json and weights do not belong together."
            )
    module.load_state_dict(given, strict=False, assign=True)


def _optional_outputs(
    queries: list[Tensor], keys: list[Tensor], heads: int, outputs: frozenset[str]
) -> dict[str, Tensor]:
    """The attention-based outputs, recomputed in float32 from each layer's projections, [B, 1 + N, D].

    Flash and SDPA kernels return no weights; one extra softmax row per head is cheap.
    """
    extra: dict[str, Tensor] = {}
    if "keys" in outputs:
        extra["keys"] = keys[-1][:, 1:]
    if "cls_attention" in outputs:
        extra["cls_attention"] = _attentions(queries, keys, heads, cls_only=True)
    if "received" in outputs:
        extra["received"] = _attentions(queries, keys, heads, cls_only=False)
    return extra


def _attentions(queries: list[Tensor], keys: list[Tensor], heads: int, *, cls_only: bool) -> Tensor:
    """[B, L, N]: attention each patch gets in each layer."""
    layers = zip(queries, keys, strict=True)
    return torch.stack([_attention(q.float(), k.float(), heads, cls_only=cls_only) for q, k in layers], dim=1)


def _attention(queries: Tensor, keys: Tensor, heads: int, *, cls_only: bool) -> Tensor:
    """[B, N]: attention each patch gets, mean over heads, from CLS or from all queries."""
    if cls_only:
        queries = queries[:, :1]
    batch, tokens, width = keys.shape
    queries = queries.view(batch, -1, heads, width // heads).transpose(1, 2)
    keys = keys.view(batch, tokens, heads, width // heads).transpose(1, 2)
    weights = torch.softmax(queries @ keys.transpose(-1, -2) * (width // heads) ** -0.5, dim=-1)
    return weights.mean((1, 2))[:, 1:]
