# SPDX-License-Identifier: Apache-2.0
"""What the engine is given of images and videos: embeddings of what stays, and masks of where it stood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from vllm_vtprune.families.base import Item, Kept
from vllm_vtprune.vision.placeholders import item_fields
from vllm_vtprune.vision.transfer import to_host

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_vtprune.vision.service import VisionService
    from vllm_vtprune.vision.shared.client import SharedTower


def embedded(
    modality: str, media: Sequence[Kept], vision: VisionService | SharedTower, model_config: ModelConfig
) -> dict[str, Any]:
    """Fields in vLLM's items of some images, or videos: what computes positions, embeddings and masks.

    Args:
        modality: theirs.
        media: what stays of each.
        vision: projects it.
        model_config: its dtype is the embeddings', its `mm_tensor_ipc` decides where they lie.
    """
    projected = vision.project(media)
    # torch_shm shares device tensors with the worker; every other transport copies host bytes
    on_device = model_config.get_multimodal_config().mm_tensor_ipc == "torch_shm"
    dtype = cast(torch.dtype, model_config.dtype)
    given = [e for e, _ in projected]
    # in memory of their own: a view would keep the whole request's for as long as one image is cached
    cached = [kept.output.patches for kept in media]
    embeddings = [e.to(dtype, copy=True) for e in given] if on_device else to_host(given, dtype, lent=cached)
    places = to_host([p for _, p in projected])
    masks = [_mask(kept.output.places, where) for kept, where in zip(media, places, strict=True)]
    return item_fields(modality, [kept.output.on_host for kept in media], embeddings, masks)


def blank(modality: str, items: Sequence[Item], width: int, dtype: torch.dtype) -> dict[str, Any]:
    """The same of items that no tower sees: all places stay, and their embeddings are zeros.

    Args:
        modality: theirs.
        items: the preprocessed images or videos.
        width: E, of the embeddings.
        dtype: of the embeddings.
    """
    embeddings = [torch.zeros((item.places, width), dtype=dtype) for item in items]
    masks = [torch.ones(item.places, dtype=torch.bool) for item in items]
    return item_fields(modality, [item.on_host for item in items], embeddings, masks)


def _mask(places: int, kept: Tensor) -> Tensor:
    mask = torch.zeros(places, dtype=torch.bool)
    mask[kept] = True
    return mask
