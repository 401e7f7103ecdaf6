# SPDX-License-Identifier: Apache-2.0
"""Keys of images and videos: by content and preprocessing, and with settings and outcome in vLLM's caches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.context import plugin_context
from vllm_vtprune.contract import KWARG
from vllm_vtprune.families.base import Family
from vllm_vtprune.vision.content import check_frames, content, decoded
from vllm_vtprune.vision.outcomes import Decided


class MediaKeys:
    """What names a model's images and videos.

    Args:
        own: the model's own processor, as `super()` gives it: vLLM's hashes, and its rule for which keyword
            arguments are whose (`BaseMultiModalProcessor._get_mm_hashes`,
            `_get_cache_missing_processor_kwargs`).
        info: the processor's (`vllm.multimodal.processing.BaseProcessingInfo`).
        family: the model's adapter.
    """

    def __init__(self, own: Any, info: Any, family: Family) -> None:
        self._own = own
        self._info = info
        self._family = family

    def decoded(self, items: MultiModalDataItems) -> dict[str, list[Any]]:
        """The decoded media that are pruned, by modality."""
        found = {modality: decoded(items, modality) for modality in self._family.modalities}
        return {modality: media for modality, media in found.items() if media}

    def keyed(self, inputs: ProcessorInputs) -> dict[str, list[Decided]]:
        """Each image and video that is pruned, with a key made from its content and its preprocessing.

        Apart from the settings. A client's `uuid` and an EXIF image id would let a request name another's
        cached picture; they count only where the operator trusts them.

        Raises:
            VLLMValidationError: a video is too short for the model.
            ValueError: an item was given by its id alone.
        """
        given = {k: v for k, v in sorted(inputs.hf_processor_mm_kwargs.items()) if k != KWARG}
        inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=given)
        found = {}
        for modality, media in self.decoded(inputs.mm_data_items).items():
            if modality == "video":
                for i, video in enumerate(media):
                    check_frames(video, i, self._family.fewest_frames)
            kwargs = self._own_kwargs(inputs, modality, len(media))
            keys = self._content_keys(inputs, modality, kwargs)
            found[modality] = [Decided(*one, modality) for one in zip(keys, media, kwargs, strict=True)]
        return found

    def of_image(self, image: Any, media_io_kwargs: Mapping[str, Any] | None = None) -> Decided:
        """An image outside a prompt, keyed as in one.

        Args:
            image: a PIL image, alone or as vLLM's media connector wraps it.
            media_io_kwargs: with which it was decoded; they are part of its key.
        """
        items = self._info.parse_mm_data({"image": [image]})
        inputs = ProcessorInputs([], items, media_io_kwargs=media_io_kwargs or {})
        return self.keyed(inputs)["image"][0]

    def item_key(self, media: Decided, setting: str) -> str:
        """An item's key in vLLM's caches and its identifier in the engine.

        Args:
            media: the image or video, with its outcome where that is known.
            setting: the request's, canonical.
        """
        outcome = {"outcome": media.outcome} if media.outcome else {}
        return self._hash(content=media.key, settings=setting, **outcome)

    def _own_kwargs(self, inputs: ProcessorInputs, modality: str, count: int) -> list[Mapping[str, Any]]:
        """The preprocessing of each of `count` items: videos may have a rate of frames each."""
        if modality != "video":
            return [inputs.hf_processor_mm_kwargs] * count
        alone = ([i != number for i in range(count)] for number in range(count))
        ask = self._own._get_cache_missing_processor_kwargs
        return [ask(inputs, {"video": others}) for others in alone]

    def _content_keys(
        self, inputs: ProcessorInputs, modality: str, kwargs: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        items = inputs.mm_data_items
        if plugin_context(self._info.ctx.model_config).policy.trust_image_ids:
            keys: list[str] = self._own._get_mm_hashes(inputs)[modality]
            return keys
        media_io = dict(inputs.media_io_kwargs.get(modality, {}))
        hashed = items[modality].get_all_items_for_hash()
        return [
            self._hash(**{modality: content(item, i, modality)}, kwargs=own, media_io=media_io)
            for i, (item, own) in enumerate(zip(hashed, kwargs, strict=True))
        ]

    def _hash(self, **factors: object) -> str:
        algorithm = self._info.ctx.get_mm_config().mm_hasher_algorithm
        return MultiModalHasher.hash_kwargs(algorithm, model_id=self._info.model_id, **factors)
