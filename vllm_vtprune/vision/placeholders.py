# SPDX-License-Identifier: Apache-2.0
"""Thinned placeholders: vLLM's own prompt update for an image, without the places of units that were dropped.

`vllm.multimodal.processing.PromptUpdate` says which tokens stand for an image, and which of them take an
embedding. Those that take none (`<img>`, `[IMG_BREAK]`) all stay, whatever the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.processing import PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.processor import UpdateMode

from vllm_vtprune.families.base import Family

#: Field of an image's item: which of the places of the unpruned image stay, bool [T], on the CPU.
KEPT = "vtprune_kept"
#: Field of an image's item: the embeddings [k', E] of the places that stay.
EMBEDDINGS = "image_embeds"


@dataclass
class ThinnedDetails(PromptUpdateDetails):
    """The tokens that stand for a pruned image.

    Attributes:
        places: T, embeddings of the unpruned image.
        gap: by how much the positions behind the image run ahead of the tokens, where positions have three
            dimensions.
    """

    places: int = 0
    gap: int = 0


def embed_mask(details: PromptUpdateDetails) -> Tensor:
    """Which of the tokens take an embedding: bool [tokens]."""
    if details.is_embed is None:
        return torch.ones(len(details.full), dtype=torch.bool)
    return details.is_embed(details.full)


def places_of(update: PromptUpdate, index: int) -> int:
    """T of an image, by the base class's own update."""
    return int(embed_mask(update._resolve_content(index)).sum())


def thin(details: PromptUpdateDetails, kept: Tensor, advance: int | None = None) -> ThinnedDetails:
    """The tokens that remain.

    Args:
        details: of the unpruned image, with T places.
        kept: bool [T], at least one of them true.
        advance: positions that the image takes; None: as many as it has tokens.

    Raises:
        ValueError: the mask does not fit the places, or keeps none: vLLM never finds an empty placeholder.
    """
    embed = embed_mask(details)
    if int(embed.sum()) != len(kept) or not bool(kept.any()):
        raise ValueError(
            f"a mask of {len(kept)} does not fit {int(embed.sum())} places, or keeps none of them"
        )
    # fixed here, since the base's may look at where a token stands
    mask, full = embed, list(details.full)
    if not bool(kept.all()):
        stays = ~embed
        stays[embed] = kept
        mask = embed[stays]
        full = [token for token, stay in zip(full, stays.tolist(), strict=True) if stay]
    gap = 0 if advance is None else max(0, advance - len(full))
    return ThinnedDetails(full, None if details.is_embed is None else lambda _: mask, len(kept), gap)


def thinned(
    updates: Sequence[PromptUpdate], out_mm_kwargs: MultiModalKwargsItems, family: Family
) -> list[PromptUpdate]:
    """The base class's updates, with those of images thinned by their items' masks.

    vLLM keeps the update with the item in its processor cache, so a hit brings both.
    """
    return [_thinned(u, out_mm_kwargs, family) if u.modality == "image" else u for u in updates]


def _thinned(update: PromptUpdate, out_mm_kwargs: MultiModalKwargsItems, family: Family) -> PromptUpdate:
    def content(index: int) -> PromptUpdateDetails:
        details, item = update._resolve_content(index), out_mm_kwargs["image"][index]
        if KEPT not in item:  # embeddings given by the caller
            return details
        kept: Any = item[KEPT].data
        embeddings: Any = item[EMBEDDINGS].data
        if int(kept.sum()) != embeddings.shape[0]:
            raise ValueError(f"{embeddings.shape[0]} embeddings for {int(kept.sum())} places that stay")
        on_host: Any = {
            name: value for name, value in item.get_data().items() if item[name].field.keep_on_cpu
        }
        return thin(details, kept, family.advance(on_host))

    field = "insertion" if update.mode is UpdateMode.INSERT else "replacement"
    changed: dict[str, Any] = {field: content}
    return dataclasses.replace(update, **changed)
