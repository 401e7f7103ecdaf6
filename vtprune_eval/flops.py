# SPDX-License-Identifier: Apache-2.0
"""Operations and bytes that one request needs, from the model's configuration and the settings.

Counted as in Kaplan et al. 2020 (arXiv 2001.08361, table 1), a multiply-add as two floating-point operations:
matrix products and attention scores; norms, activations and sampling are left out (under 1 %). Bytes are what
must move between memory and processor at least once: weights once per engine step, shared by the requests in
it, and keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vllm_vtprune.kv_drop.ratings import ITERATIONS
from vtprune_loadtest.errors import LoadTestError

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class CostShape:
    """What of the configuration of a LLaVA or a Qwen2.5-VL decides its cost.

    Attributes:
        patches: vision tokens per image before pruning.
        tower_layers: up to the feature layer.
        kv_width: key heads times head size.
        q_width: query heads times head size.
        element: bytes per weight and per cached value.
        unit: patches that the tower sees for each vision token.
        cls: tokens that the tower sees beside them.
        mlp_products: matrix products of a tower layer's MLP; three where it is gated.
        whole_layers: tower layers that attend over the whole picture, the others in windows; None: all.
        window: patches of a window.
    """

    patches: int
    patch_inputs: int
    tower_hidden: int
    tower_intermediate: int
    tower_layers: int
    hidden: int
    intermediate: int
    layers: int
    q_width: int
    kv_width: int
    vocab: int
    element: int
    unit: int = 1
    cls: int = 1
    mlp_products: int = 2
    whole_layers: int | None = None
    window: int = 0

    @staticmethod
    def of(folder: Path, patches: int | None = None) -> CostShape:
        """Read a checkpoint's config.json.

        Args:
            folder: the checkpoint's.
            patches: vision tokens of the pictures that were measured, where the model takes any size.

        Raises:
            LoadTestError: it is neither a LLaVA-1.5's nor a Qwen2.5-VL's of a known number of vision tokens.
        """
        return CostShape.of_config(json.loads((folder / "config.json").read_text()), patches)

    @staticmethod
    def of_config(config: Mapping[str, Any], patches: int | None = None) -> CostShape:
        """Read a configuration of LLaVA's or Qwen2.5-VL's form.

        Raises:
            LoadTestError: as `of`.
        """
        vision, text = config["vision_config"], config["text_config"]
        heads = text["num_attention_heads"]
        head = text.get("head_dim") or text["hidden_size"] // heads
        decoder = {
            "hidden": text["hidden_size"],
            "intermediate": text["intermediate_size"],
            "layers": text["num_hidden_layers"],
            "q_width": heads * head,
            "kv_width": text.get("num_key_value_heads", heads) * head,
            "vocab": text["vocab_size"],
            "element": _BYTES[config.get("dtype") or config.get("torch_dtype") or "float32"],
        }
        tower = {"tower_hidden": vision["hidden_size"], "tower_intermediate": vision["intermediate_size"]}
        side = vision["patch_size"]
        if config.get("model_type") == "qwen2_5_vl" and patches is not None:
            unit = vision["spatial_merge_size"] ** 2
            return CostShape(
                patches=patches,
                patch_inputs=3 * vision["temporal_patch_size"] * side**2,
                **tower,
                tower_layers=vision["depth"],
                **decoder,
                unit=unit,
                cls=0,
                mlp_products=3,
                whole_layers=len(vision["fullatt_block_indexes"]),
                window=(vision["window_size"] // side) ** 2,
            )
        if "image_size" not in vision:
            raise LoadTestError(
                f"The work of a {config.get('model_type')} is not counted here: take the results of a "
                "LLaVA-1.5, or those of a Qwen2.5-VL with the arm `off` among them."
            )
        layer = config.get("vision_feature_layer", -2)
        return CostShape(
            patches=(vision["image_size"] // side) ** 2,
            patch_inputs=3 * side**2,
            **tower,
            tower_layers=layer if layer >= 0 else vision["num_hidden_layers"] + 1 + layer,
            **decoder,
        )

    @staticmethod
    def of_decoder(decoder: Mapping[str, int]) -> CostShape:
        """From the decoder's numbers in `/vtprune/config`; tower and projector cost nothing."""
        return CostShape(0, 0, 0, 0, 0, **decoder)

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer."""
        attention = self.hidden * (2 * self.q_width + 2 * self.kv_width)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def tower_weights(self) -> int:
        """Weights of the tower up to the feature layer."""
        mlp = self.mlp_products * self.tower_hidden * self.tower_intermediate
        layer = 4 * self.tower_hidden**2 + mlp
        return self.tower_layers * layer + self.patch_inputs * self.tower_hidden

    @property
    def projector_weights(self) -> int:
        """Weights of LLaVA's two-layer projector, or of Qwen2.5-VL's merger."""
        if self.unit == 1:
            return self.tower_hidden * self.hidden + self.hidden**2
        merged = self.unit * self.tower_hidden
        return merged**2 + merged * self.hidden


@dataclass(frozen=True)
class RequestShape:
    """What of one request decides its cost.

    Attributes:
        text_tokens: prompt tokens that are not vision tokens.
        kept: vision tokens per image after the first stage.
        output: tokens generated.
        bands: what the second stage leaves: each prune layer K, from the lowest up, and the prompt tokens
            above it. Empty where there is no second stage.
    """

    images: int
    text_tokens: int
    kept: float
    output: int
    bands: tuple[tuple[int, float], ...] = ()

    @property
    def prompt(self) -> float:
        """Prompt tokens given to the language model."""
        return self.text_tokens + self.images * self.kept

    def by_band(self, layers: int) -> list[tuple[int, float]]:
        """Layers of each band of a decoder of so many, and the prompt tokens that they see."""
        edges = [0, *(layer for layer, _ in self.bands), layers]
        tokens = [self.prompt, *(kept for _, kept in self.bands)]
        return [(high - low, seen) for (low, high), seen in zip(pairwise(edges), tokens, strict=True)]


@dataclass(frozen=True)
class Work:
    """Operations, and bytes moved."""

    flops: float
    bytes: float

    def seconds(self, peak_flops: float, bandwidth: float) -> float:
        """The roofline's lower bound (Williams et al. 2009): limited by arithmetic or by memory."""
        return max(self.flops / peak_flops, self.bytes / bandwidth)


def request_work(shape: CostShape, request: RequestShape, batch: int = 1) -> Mapping[str, Work]:
    """Work of one request by phase: `tower`, `projector`, `prefill`, `decode`.

    Args:
        shape: the model's.
        request: the request's.
        batch: requests that decode together and so share each reading of the weights. Prefill and tower are
            charged a reading of their own: they are bound by arithmetic anyway.
    """
    return {
        "tower": _tower(shape, request.images),
        "projector": _projector(shape, request.images * request.kept),
        "prefill": _prefill(shape, request),
        "decode": _decode(shape, request, batch),
    }


def _tower(shape: CostShape, images: int) -> Work:
    tokens, width = shape.unit * shape.patches + shape.cls, shape.tower_hidden
    whole = shape.tower_layers if shape.whole_layers is None else shape.whole_layers
    windowed = (shape.tower_layers - whole) * min(shape.window, tokens)
    attention = 4 * tokens * (whole * tokens + windowed) * width
    return Work(images * (2 * tokens * shape.tower_weights + attention), shape.tower_weights * shape.element)


def _projector(shape: CostShape, tokens: float) -> Work:
    return Work(2 * tokens * shape.projector_weights, shape.projector_weights * shape.element)


def _prefill(shape: CostShape, request: RequestShape) -> Work:
    flops = moved = 0.0
    for layers, tokens in request.by_band(shape.layers):
        causal = 4 * shape.q_width * tokens * (tokens + 1) / 2
        flops += layers * (2 * tokens * shape.layer_weights + causal)
        moved += layers * (shape.layer_weights + 2 * tokens * shape.kv_width) * shape.element
    head = shape.hidden * shape.vocab
    return Work(flops + 2 * head, moved + head * shape.element)


def _decode(shape: CostShape, request: RequestShape, batch: int) -> Work:
    """The prefill yields the first token; `output - 1` steps the rest."""
    steps = request.output - 1
    weights = shape.layers * shape.layer_weights + shape.hidden * shape.vocab
    flops, moved = 2.0 * weights * steps, weights * shape.element * steps / batch
    for layers, tokens in request.by_band(shape.layers):
        # step i attends to the prompt and i tokens generated so far
        context = steps * tokens + steps * (steps + 1) / 2
        flops += layers * 4 * shape.q_width * context
        moved += layers * 2 * shape.kv_width * shape.element * (context + steps)
    return Work(flops, moved)


def kv_bytes(shape: CostShape, request: RequestShape) -> float:
    """KV cache that the request's prompt holds, over all layers."""
    entries = sum(layers * tokens for layers, tokens in request.by_band(shape.layers))
    return entries * 2 * shape.kv_width * shape.element


def rating_flops(shape: CostShape, rating: str, tokens: float, window: int) -> float:
    """Operations that rate a prompt's tokens at a prune layer: logits and key norms, softmax left out.

    Args:
        shape: the model's.
        rating: a name of `vllm_vtprune.kv_drop.relevance.RELEVANCE`; any other costs nothing.
        tokens: of the prompt that reach the prune layer.
        window: last prompt tokens that rate the others.
    """
    logits = 2 * shape.q_width * tokens
    return {
        "attention": window * logits,
        "no_rope": window * logits,
        "last_token": logits,
        # every iteration makes all pairs' logits anew
        "pagerank": ITERATIONS * tokens * logits,
        "key_norm": 2 * shape.kv_width * tokens,
    }.get(rating, 0.0)


def as_dict(work: Mapping[str, Work]) -> dict[str, Any]:
    """JSON form, in GFLOP and MB."""
    return {name: {"gflop": w.flops / 1e9, "mbyte": w.bytes / 1e6} for name, w in work.items()}
