# SPDX-License-Identifier: Apache-2.0
"""Thinned placeholders: vLLM's own prompt update for an image or video, without the places of dropped units.

`vllm.multimodal.processing.PromptUpdate` says which tokens stand for an image, and which of them take an
embedding. Those that take none (`<img>`, `[IMG_BREAK]`, a frame's time) all stay, whatever the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.processing import PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.processor import UpdateMode

from vllm_vtprune.families.base import Family


@dataclass(frozen=True)
class ItemFields:
    """Names of our fields in vLLM's items of one modality: a field belongs to a single one.

    Attributes:
        embeddings: [k', E] of the places that stay.
        kept: which of the places of the unpruned item stay, bool [T], on the CPU.
        layout: which of the unpruned item's tokens take an embedding, bool [tokens], on the CPU. Where
            positions are computed from the unpruned prompt, and some of its tokens take none.
    """

    embeddings: str
    kept: str
    layout: str


FIELDS: Mapping[str, ItemFields] = {
    "image": ItemFields("image_embeds", "vtprune_kept", "vtprune_layout"),
    "video": ItemFields("video_embeds", "vtprune_video_kept", "vtprune_video_layout"),
}


def item_fields(
    modality: str, on_host: Sequence[Mapping[str, Tensor]], embeddings: list[Tensor], kept: list[Tensor]
) -> dict[str, Any]:
    """The fields of some items of one modality, as vLLM takes them apart by `field_configs`.

    Args:
        modality: the items'.
        on_host: per item what computes positions.
        embeddings: per item [k', E].
        kept: per item, bool [T].
    """
    shared: dict[str, Any] = {}
    for name in on_host[0]:
        values = [fields[name] for fields in on_host]
        # the base class computes with these, so they are stacked; ragged ones stay lists
        alike = len({value.shape for value in values}) == 1
        shared[name] = torch.stack(values) if alike else values
    names = FIELDS[modality]
    return {**shared, names.embeddings: embeddings, names.kept: kept}


def field_configs(given: Container[str]) -> dict[str, MultiModalFieldConfig]:
    """How vLLM takes our fields apart.

    Args:
        given: names of the fields that are there.
    """
    configs = {}
    for modality, names in FIELDS.items():
        if names.kept in given:
            configs[names.embeddings] = MultiModalFieldConfig.batched(modality)
            # on the CPU: it is all the worker is given of an item that the prefix cache covers
            # (`vllm.multimodal.utils.strip_covered_mm_data`), and positions are computed from it
            configs[names.kept] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        if names.layout in given:
            configs[names.layout] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
    return configs


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


def thin(details: PromptUpdateDetails, kept: Tensor, advance: int | None = None) -> ThinnedDetails:
    """The tokens that remain.

    Args:
        details: of the unpruned image, with T places.
        kept: bool [T], at least one of them true.
        advance: positions that the image's embeddings take; None: as many as there are.

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
    gap = 0 if advance is None else max(0, advance - int(kept.sum()))
    return ThinnedDetails(full, None if details.is_embed is None else lambda _: mask, len(kept), gap)


def thinned(
    updates: Sequence[PromptUpdate], out_mm_kwargs: MultiModalKwargsItems, family: Family
) -> list[PromptUpdate]:
    """The base class's updates, with those of images and videos thinned by their items' masks.

    vLLM keeps the update with the item in its processor cache, so a hit brings both.
    """
    return [_thinned(u, out_mm_kwargs, family) if u.modality in FIELDS else u for u in updates]


def _thinned(update: PromptUpdate, out_mm_kwargs: MultiModalKwargsItems, family: Family) -> PromptUpdate:
    names = FIELDS[update.modality]

    def content(index: int) -> PromptUpdateDetails:
        details, item = update._resolve_content(index), out_mm_kwargs[update.modality][index]
        if names.kept not in item:  # embeddings given by the caller, or what passes through vLLM's own tower
            return details
        kept: Any = item[names.kept].data
        embeddings: Any = item[names.embeddings].data
        if int(kept.sum()) != embeddings.shape[0]:
            raise ValueError(f"{embeddings.shape[0]} embeddings for {int(kept.sum())} places that stay")
        on_host: Any = {
            name: value for name, value in item.get_data().items() if item[name].field.keep_on_cpu
        }
        return thin(details, kept, family.advance(on_host))

    field = "insertion" if update.mode is UpdateMode.INSERT else "replacement"
    changed: dict[str, Any] = {field: content}
    return dataclasses.replace(update, **changed)
