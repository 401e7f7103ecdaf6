# SPDX-License-Identifier: Apache-2.0
"""vLLM's multimodal processor for LLaVA, with stage 1 inside it.

vLLM sizes the placeholders here, before the scheduler sees the request, so this is where the exact number of
kept tokens must be known. Hooks, all of `vllm.multimodal.processing.BaseMultiModalProcessor` in vLLM 0.32:
`_cached_apply_hf_processor`, `_get_mm_hashes`, `_get_cache_missing_processor_kwargs`,
`_apply_hf_processor_main`, `_get_mm_fields_config`, `_get_prompt_updates` and `get_dummy_inputs`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from vllm.model_executor.models.llava import LlavaMultiModalProcessor
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.context import plugin_context
from vllm_vtprune.contract import KWARG
from vllm_vtprune.selection.features import VisionFeatures
from vllm_vtprune.selection.registry import get_method
from vllm_vtprune.selection.scores import SCORE_NEEDS
from vllm_vtprune.settings import VisionSettings
from vllm_vtprune.vision.crop import bounded
from vllm_vtprune.vision.encoder import OPTIONAL_OUTPUTS, TowerOutput
from vllm_vtprune.vision.service import VisionService, vision_service

#: Content keys of the images at hand, handed from hook to hook inside the processor's keyword arguments.
_KEYS = "vtprune_content_keys"
#: Settings of the dummy images with which vLLM sizes its buffers: they count unpruned and run no tower.
_DUMMY = "dummy"


class PrunedLlavaMultiModalProcessor(LlavaMultiModalProcessor):
    """Replaces an image's pixels by the projected embeddings of the vision tokens that stay.

    The settings arrive as ``mm_processor_kwargs["vtprune"]`` in canonical form; absent, the operator's
    default applies. The item's key in vLLM's caches is made from the image's content and the settings; the
    tower's output is cached by content alone.
    """

    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        kwargs = {KWARG: self._default_setting(), **inputs.hf_processor_mm_kwargs}
        kwargs[_KEYS] = [] if kwargs[KWARG] == _DUMMY else self._content_keys(inputs, kwargs)
        inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs)
        return super()._cached_apply_hf_processor(inputs, timing_ctx)

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Mapping[str, list[str]]:
        kwargs: dict[str, Any] = dict(inputs.hf_processor_mm_kwargs)
        keys = kwargs.pop(_KEYS)
        if not _raw_images(inputs.mm_data_items) or kwargs[KWARG] == _DUMMY:
            return super()._get_mm_hashes(dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs))
        return {"image": [self._hash(content=key, settings=kwargs[KWARG]) for key in keys]}

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        kwargs: dict[str, Any] = dict(inputs.hf_processor_mm_kwargs)
        cached = mm_is_cached.get("image", [])
        if kwargs[_KEYS]:
            kwargs[_KEYS] = [key for key, hit in zip(kwargs[_KEYS], cached, strict=True) if not hit]
        return kwargs

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        # neither key may reach the Hugging Face processor, which warns about or chokes on unknown ones
        hf_kwargs = dict(hf_kwargs)
        setting = str(hf_kwargs.pop(KWARG))
        keys: list[str] = hf_kwargs.pop(_KEYS)  # type: ignore[assignment]
        images = _raw_images(mm_items)
        if not images:
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if setting == _DUMMY:
            return BatchFeature({"image_embeds": self._dummy_embeddings(len(images))})
        embeddings = self._embed(images, keys, VisionSettings.from_canonical(setting), hf_kwargs)
        return BatchFeature({"image_embeds": embeddings})

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        """As many placeholders as the item has embeddings: the one place where the two are made equal.

        The count is read off the very tensor the language model will be given. vLLM keeps the update with the
        tensor in its processor cache, so a hit brings both.
        """
        token = self.info.get_hf_config().image_token_index

        def placeholders(index: int) -> list[int]:
            embeddings = cast(Tensor, out_mm_kwargs["image"][index]["image_embeds"].data)
            return [token] * embeddings.shape[0]

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> ProcessorInputs:
        """Profiling inputs: the largest number of tokens a request can have, so nothing is pruned."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        return dataclasses.replace(inputs, hf_processor_mm_kwargs={KWARG: _DUMMY})

    def prefetch(
        self,
        mm_data: Any,
        mm_processor_kwargs: Mapping[str, Any] | None,
        media_io_kwargs: Mapping[str, Mapping[str, object]] | None,
        cache: Any,
    ) -> tuple[int, int]:
        """Run the tower for a request's images, so that the processor finds its outputs in the cache.

        vLLM's processor runs on one thread; calling this from several beforehand is what lets concurrent
        requests share a pass of the tower. Thread-safe.

        Args:
            mm_data: the prompt's `multi_modal_data`.
            mm_processor_kwargs: the prompt's.
            media_io_kwargs: the prompt's.
            cache: vLLM's processor cache, or None; what it holds needs no tower.

        Returns:
            How many distinct images needed no pass of the tower, and how many did; both 0 where vLLM's cache
            holds all of them.
        """
        policy = plugin_context(self.info.ctx.model_config).policy
        items = self.info.parse_mm_data(mm_data)
        images = _raw_images(items)
        # images named by a trusted id need not be there at all: the processor sorts that out
        if not images or policy.feature_cache_gb == 0 or policy.trust_image_ids:
            return 0, 0
        kwargs: dict[str, Any] = {KWARG: self._default_setting(), **(mm_processor_kwargs or {})}
        inputs = ProcessorInputs(
            [], items, hf_processor_mm_kwargs=kwargs, media_io_kwargs=media_io_kwargs or {}
        )
        kwargs[_KEYS] = self._content_keys(inputs, kwargs)
        if cache is not None and all(cache.is_cached(self._get_mm_hashes(inputs)["image"])):
            return 0, 0
        settings = VisionSettings.from_canonical(str(kwargs.pop(KWARG)))
        keys: list[str] = kwargs.pop(_KEYS)
        hits = self.vision.available(set(keys), frozenset() if settings.keeps_all else _needs(settings))
        self._features(images, keys, settings, kwargs)
        return hits, len(set(keys)) - hits

    def vision_features(
        self, image: Any, settings: VisionSettings, media_io_kwargs: Mapping[str, Any] | None = None
    ) -> VisionFeatures:
        """What selection is given for one image, through the tower and cache that serving uses.

        Args:
            image: a PIL image, alone or as vLLM's media connector wraps it.
            settings: decide which optional outputs the tower computes; the score's are always among them.
            media_io_kwargs: with which the image was decoded; they are part of its key in the cache.

        Raises:
            ValueError: the image cannot be preprocessed.
        """
        items = self.info.parse_mm_data({"image": [image]})
        inputs = ProcessorInputs([], items, hf_processor_mm_kwargs={}, media_io_kwargs=media_io_kwargs or {})
        keys = self._content_keys(inputs, {})
        return _stack(
            self._encode(_raw_images(items), keys, _needs(settings), {}), keys, self.vision.encoder.grid
        )

    @property
    def vision(self) -> VisionService:
        """The process's tower; loaded on first use."""
        return vision_service(self.info.ctx.model_config)

    def _default_setting(self) -> str:
        return plugin_context(self.info.ctx.model_config).policy.default_settings.vision.canonical()

    def _embed(
        self, images: list[Any], keys: list[str], settings: VisionSettings, hf_kwargs: Mapping[str, object]
    ) -> list[Tensor]:
        """Per image [k, hidden] embeddings of the tokens that stay, in the model's dtype."""
        features = self._features(images, keys, settings, hf_kwargs)
        if settings.keeps_all:
            kept = [f.patches for f in features]
        else:
            batch = _stack(features, keys, self.vision.encoder.grid)
            selections = get_method(settings.method).select(batch, settings)
            kept = [s.gather(f.patches) for s, f in zip(selections, features, strict=True)]
        projected = self.vision.encoder.project([(k, f.cls) for k, f in zip(kept, features, strict=True)])
        model_config = self.info.ctx.model_config
        # torch_shm shares device tensors with the worker; every other transport copies host bytes
        on_device = model_config.get_multimodal_config().mm_tensor_ipc == "torch_shm"
        dtype = cast(torch.dtype, model_config.dtype)
        return [t.to(t.device if on_device else "cpu", dtype) for t in projected]

    def _features(
        self, images: list[Any], keys: list[str], settings: VisionSettings, hf_kwargs: Mapping[str, object]
    ) -> list[TowerOutput]:
        needs = frozenset[str]() if settings.keeps_all else _needs(settings)
        return self._encode(images, keys, needs, hf_kwargs)

    def _encode(
        self, images: list[Any], keys: list[str], needs: frozenset[str], hf_kwargs: Mapping[str, object]
    ) -> list[TowerOutput]:
        def pixels(positions: list[int]) -> Tensor:
            image_processor = self.info.get_hf_processor(**hf_kwargs).image_processor
            looked_at = [_bounded(images[i], image_processor) for i in positions]
            data = self._call_hf_processor({"images": looked_at}, hf_kwargs)
            return torch.as_tensor(data["pixel_values"])

        return self.vision.encode(keys, pixels, needs)

    def _dummy_embeddings(self, count: int) -> list[Tensor]:
        model_config = self.info.ctx.model_config
        shape = (self.info.get_max_image_tokens(), model_config.get_inputs_embeds_size())
        return [torch.zeros(shape, dtype=cast(torch.dtype, model_config.dtype)) for _ in range(count)]

    def _content_keys(self, inputs: ProcessorInputs, kwargs: Mapping[str, object]) -> list[str]:
        """Per image a key made from its content and its preprocessing, apart from the settings.

        A client's `uuid` and an EXIF image id would let a request name another's cached picture; they count
        only where the operator trusts them.
        """
        items = inputs.mm_data_items
        images = _raw_images(items)
        if not images:
            return []
        preprocessing = {k: v for k, v in sorted(kwargs.items()) if k not in (KWARG, _KEYS)}
        if plugin_context(self.info.ctx.model_config).policy.trust_image_ids:
            trusted = dataclasses.replace(inputs, hf_processor_mm_kwargs=preprocessing)
            return super()._get_mm_hashes(trusted)["image"]
        raw = items.get_items("image", ImageProcessorItems).get_all_items_for_hash()
        media_io = {k: v for k, v in inputs.media_io_kwargs.get("image", {}).items()}
        return [
            self._hash(image=_content(item, i), kwargs=preprocessing, media_io=media_io)
            for i, item in enumerate(raw)
        ]

    def _hash(self, **factors: object) -> str:
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        return MultiModalHasher.hash_kwargs(algorithm, model_id=self.info.model_id, **factors)


def _raw_images(items: MultiModalDataItems) -> list[Any]:
    """The decoded images; empty for text-only prompts and for embeddings given by the caller."""
    images = items.get("image")
    return list(images.get_all()) if isinstance(images, ImageProcessorItems) else []


def _content(item: Any, index: int) -> object:
    """What identifies an image: its bytes as received, or its decoded pixels."""
    if item is None:
        raise ValueError(
            f"Image {index} was given by its id alone: send the image itself, or start the server with "
            "trust_image_ids where clients may share cached images by id."
        )
    if isinstance(item, MediaWithBytes):
        return {"bytes": item.original_bytes, "io": item.io_config or {}}
    if isinstance(item, Image.Image):
        palette = item.palette
        return {
            "mode": item.mode,
            "pixels": np.asarray(item),
            "palette": None if palette is None else [palette.mode, bytes(palette.palette)],
        }
    return item


def _bounded(image: Any, image_processor: Any) -> Any:
    return bounded(image, image_processor) if isinstance(image, Image.Image) else image


def _needs(settings: VisionSettings) -> frozenset[str]:
    """The optional outputs of the tower that the method and the score read."""
    return (get_method(settings.method).needs | SCORE_NEEDS[settings.score]) & OPTIONAL_OUTPUTS


def _stack(features: list[TowerOutput], keys: list[str], grid: tuple[int, int]) -> VisionFeatures:
    def stacked(name: str) -> Tensor | None:
        values = [getattr(f, name) for f in features]
        return None if any(v is None for v in values) else torch.stack(values)

    return VisionFeatures(
        patches=torch.stack([f.patches for f in features]),
        cls=torch.stack([f.cls for f in features]),
        grid=grid,
        seeds=tuple(int(key[:16], 16) for key in keys),
        **{name: stacked(name) for name in OPTIONAL_OUTPUTS},
    )
