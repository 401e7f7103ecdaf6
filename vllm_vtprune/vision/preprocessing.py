# SPDX-License-Identifier: Apache-2.0
"""From decoded images and videos to the fields that the tower is given: all of it is vLLM's preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import ExifTags, Image
from torch import Tensor
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems

from vllm_vtprune.families.base import Family, Item
from vllm_vtprune.vision.outcomes import Decided
from vllm_vtprune.vision.placeholders import FIELDS, embed_mask


class Preprocessing:
    """A model's own preprocessing, without the prompt.

    Args:
        own: the model's own processor, as `super()` gives it: its preprocessing, its fields and its prompt
            updates (`BaseMultiModalProcessor._apply_hf_processor_main`, `_get_mm_fields_config`,
            `_get_prompt_updates`).
        info: the processor's (`vllm.multimodal.processing.BaseProcessingInfo`).
        family: the model's adapter.
    """

    def __init__(self, own: Any, info: Any, family: Family) -> None:
        self._own = own
        self._info = info
        self._family = family

    def items(self, media: Sequence[Decided]) -> list[Item]:
        """Per image and video the fields that the model's own class would be given, and its places.

        Raises:
            ValueError: one cannot be preprocessed.
        """
        images = [one for one in media if one.modality == "image"]
        # images have their keyword arguments in common; videos are preprocessed one by one, as vLLM does
        raw = [image.raw for image in images]
        prepared = iter(self.together("image", raw, images[0].kwargs) if images else ())
        return [
            next(prepared)
            if one.modality == "image"
            else self.together(one.modality, [one.raw], one.kwargs)[0]
            for one in media
        ]

    def together(self, modality: str, media: list[Any], kwargs: Mapping[str, Any]) -> list[Item]:
        """The same for decoded media of one modality with the same keyword arguments."""
        image_processor = getattr(self._info.get_hf_processor(**kwargs), "image_processor", None)
        looked_at = [
            self._family.bounded(one, image_processor) if isinstance(one, Image.Image) else one
            for one in media
        ]
        if modality == "image" and all(map(_upright, looked_at)):
            # as the parser would give it, less a copy of each picture (`ImageOps.exif_transpose`)
            mm_items = MultiModalDataItems({"image": ImageProcessorItems(looked_at)})
        else:
            mm_items = self._info.parse_mm_data({modality: looked_at}, validate=False)
        data = self._own._apply_hf_processor_main(mm_items, kwargs)
        base = MultiModalKwargsItems.from_hf_inputs(data, self._own._get_mm_fields_config(data, kwargs))
        places = self._family.places() if modality == "image" else None
        if places is None:
            updates = self._own._get_prompt_updates(mm_items, kwargs, base)
            (update,) = (u for u in updates if u.modality == modality)
        items = []
        for i, item in enumerate(base[modality]):
            inputs = {name: _tensor(value) for name, value in item.get_data().items()}
            on_host = {name: value for name, value in inputs.items() if item[name].field.keep_on_cpu}
            if places is not None:
                items.append(Item(inputs, on_host, places, modality))
                continue
            embed = embed_mask(update._resolve_content(i))
            if self._info.ctx.model_config.uses_mrope and not bool(embed.all()):
                on_host[FIELDS[modality].layout] = embed
            items.append(Item(inputs, on_host, int(embed.sum()), modality))
        return items


def _tensor(value: Any) -> Tensor:
    # seconds are rounded to a digit for the prompt, and in float32 some go the other way
    exact = torch.float64 if isinstance(value, list) and any(isinstance(v, float) for v in value) else None
    return torch.as_tensor(value, dtype=exact)


def _upright(image: Any) -> bool:
    """Whether vLLM's parser (`MultiModalDataParser._parse_image_data`) leaves its pixels as they are."""
    return (
        isinstance(image, Image.Image)
        and image.mode == "RGB"
        and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    )
