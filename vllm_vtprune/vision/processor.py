# SPDX-License-Identifier: Apache-2.0
"""Stage 1 inside vLLM's multimodal processor, whatever the model.

vLLM sizes the placeholders here, before the scheduler sees the request, so this is where the exact number of
kept tokens must be known. Hooks, all of `vllm.multimodal.processing.BaseMultiModalProcessor` in vLLM 0.32:
`_cached_apply_hf_processor`, `_get_mm_hashes`, `_get_cache_missing_processor_kwargs`,
`_apply_hf_processor_main`, `_get_mm_fields_config`, `_get_prompt_updates`, `_maybe_apply_prompt_updates`,
`apply` and `get_dummy_inputs`.

An image's way: content key -> (tower's output, from the cache or by `vision.service`) -> selection ->
the item's key (`vision.outcomes`) -> embeddings and the mask of the places that stay -> the base class's
placeholder, thinned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import ExifTags, Image
from torch import Tensor
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.context import plugin_context
from vllm_vtprune.contract import KWARG
from vllm_vtprune.families.base import Family, Item, Kept, TowerOutput
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.selection.registry import get_method
from vllm_vtprune.settings import VisionSettings
from vllm_vtprune.vision.content import content
from vllm_vtprune.vision.features import for_family, needs_of, select
from vllm_vtprune.vision.outcomes import Decided
from vllm_vtprune.vision.placeholders import EMBEDDINGS, KEPT, ThinnedDetails, embed_mask, places_of, thinned
from vllm_vtprune.vision.question import QuestionRater, question_rater
from vllm_vtprune.vision.service import VisionService, vision_service
from vllm_vtprune.vision.transfer import to_host

if TYPE_CHECKING:
    from vllm_vtprune.vision.shared.client import SharedTower

#: The images at hand (`Decided`), handed from hook to hook inside the processor's keyword arguments.
_IMAGES = "vtprune_images"
#: Settings of the dummy images with which vLLM sizes its buffers: they count unpruned and run no tower.
_DUMMY = "dummy"
#: Key of a processed prompt: its vision tokens before pruning.
VISION_TOKENS = "vtprune_vision_tokens"


class PrunedProcessor(BaseMultiModalProcessor[Any]):
    """Replaces an image's pixels by the embeddings of the vision tokens that stay; videos pass as they are.

    Stands before the model's own processor in the order of inheritance (`pruned_processor`). A subclass of
    vLLM's base, or Python would not let an object become one of this class.

    The settings arrive as ``mm_processor_kwargs["vtprune"]`` in canonical form; absent, the operator's
    default applies. The item's key in vLLM's caches is made from the image's content, the settings and what
    they let stay; the tower's output is cached by content alone.
    """

    # --- the two entrances -------------------------------------------------------------------------------

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
        inputs = self._prepared(
            ProcessorInputs(
                [],
                items,
                hf_processor_mm_kwargs=mm_processor_kwargs or {},
                media_io_kwargs=media_io_kwargs or {},
            )
        )
        if cache is not None and all(cache.is_cached(self._get_mm_hashes(inputs)["image"])):
            return 0, 0
        setting, decided, kwargs = _taken(inputs.hf_processor_mm_kwargs)
        keys = [image.key for image in decided]
        needs = needs_of([self._settings(setting)])
        hits = self.vision.available(set(keys), needs)
        self._encode(images, keys, needs, kwargs)
        return hits, len(set(keys)) - hits

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        """The processed prompt, which tells its vision tokens before pruning too."""
        result: Any = super().apply(inputs, timing_ctx)
        result[VISION_TOKENS] = getattr(inputs.mm_data_items, VISION_TOKENS, 0)
        return result

    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        inputs = self._prepared(inputs)
        self._decide(inputs)
        return super()._cached_apply_hf_processor(inputs, timing_ctx)

    def _prepared(self, inputs: ProcessorInputs) -> ProcessorInputs:
        """The inputs with the setting, and each image's content key, among their keyword arguments.

        What stays of an image is what stayed of it last, where this process knows.
        """
        kwargs: dict[str, Any] = {KWARG: self._default_setting(), **inputs.hf_processor_mm_kwargs}
        setting = kwargs[KWARG]
        keys = [] if setting == _DUMMY else self._content_keys(inputs)
        kwargs[_IMAGES] = [Decided(key, self.vision.outcomes.get(key, setting)) for key in keys]
        return dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs)

    def _decide(self, inputs: ProcessorInputs) -> None:
        """Select for every image that vLLM's cache does not hold as it was decided last."""
        setting, decided, kwargs = _taken(inputs.hf_processor_mm_kwargs)
        if not decided or self._settings(setting).keeps_all:
            return
        # as vLLM decides whether to use it (`BaseMultiModalProcessor._cached_apply_hf_processor`)
        given = any(items.get_passthrough_data() for items in inputs.mm_data_items.values())
        cache = None if given else inputs.cache
        images: dict[str, Any] = {}
        for image, raw in zip(decided, _raw_images(inputs.mm_data_items), strict=True):
            # a trusted id may stand for an image that is not there
            held = cache is not None and image.outcome and cache.is_cached_item(self._key(image, setting))
            if not held and raw is not None:
                images[image.key] = raw
        if not images:
            return
        kept = dict(
            zip(images, self._select(list(images.values()), list(images), setting, kwargs), strict=True)
        )
        for image in decided:
            if image.key in kept:
                self.vision.outcomes.put(image.key, setting, image.decide(kept[image.key]))

    # --- keys in vLLM's caches ---------------------------------------------------------------------------

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Mapping[str, list[str]]:
        setting, decided, kwargs = _taken(inputs.hf_processor_mm_kwargs)
        items = inputs.mm_data_items
        ours = {"image": [self._key(image, setting) for image in decided]} if decided else {}
        others = MultiModalDataItems({m: v for m, v in items.items() if m not in ours})
        if setting == _DUMMY:  # never mistaken for a request's picture of the same content
            kwargs[KWARG] = _DUMMY
        inputs = dataclasses.replace(inputs, mm_data_items=others, hf_processor_mm_kwargs=kwargs)
        # in the order of the items, which the base class's hashes follow too
        hashes = {**super()._get_mm_hashes(inputs), **ours}
        return {modality: hashes[modality] for modality in items}

    def _get_cache_missing_processor_kwargs(
        self, inputs: ProcessorInputs, mm_is_cached: Mapping[str, list[bool]]
    ) -> Mapping[str, object]:
        setting, decided, kwargs = _taken(inputs.hf_processor_mm_kwargs)
        stripped = dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs)
        missing = [d for d, hit in zip(decided, mm_is_cached.get("image", ()), strict=False) if not hit]
        base = super()._get_cache_missing_processor_kwargs(stripped, dict(mm_is_cached))
        return {**base, KWARG: setting, _IMAGES: missing}

    def _key(self, image: Decided, setting: str) -> str:
        """An item's key in vLLM's caches and its identifier in the engine."""
        outcome = {"outcome": image.outcome} if image.outcome else {}
        return self._hash(content=image.key, settings=setting, **outcome)

    def _content_keys(self, inputs: ProcessorInputs) -> list[str]:
        """Per image a key made from its content and its preprocessing, apart from the settings.

        A client's `uuid` and an EXIF image id would let a request name another's cached picture; they count
        only where the operator trusts them.
        """
        items = inputs.mm_data_items
        if not _raw_images(items):
            return []
        preprocessing = {k: v for k, v in sorted(inputs.hf_processor_mm_kwargs.items()) if k != KWARG}
        if plugin_context(self.info.ctx.model_config).policy.trust_image_ids:
            trusted = dataclasses.replace(inputs, hf_processor_mm_kwargs=preprocessing)
            return super()._get_mm_hashes(trusted)["image"]
        raw = items.get_items("image", ImageProcessorItems).get_all_items_for_hash()
        media_io = dict(inputs.media_io_kwargs.get("image", {}))
        return [
            self._hash(image=content(item, i), kwargs=preprocessing, media_io=media_io)
            for i, item in enumerate(raw)
        ]

    def _hash(self, **factors: object) -> str:
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        return MultiModalHasher.hash_kwargs(algorithm, model_id=self.info.model_id, **factors)

    # --- pixels to embeddings ----------------------------------------------------------------------------

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        # neither key may reach the Hugging Face processor, which warns about or chokes on unknown ones
        setting, decided, kwargs = _taken(hf_kwargs)
        images = _raw_images(mm_items)
        if not images:
            return super()._apply_hf_processor_main(mm_items, kwargs)
        others = {
            modality: items for modality, items in mm_items.items() if modality != "image" and len(items)
        }
        data = BatchFeature()
        if others:
            data.update(super()._apply_hf_processor_main(MultiModalDataItems(others), kwargs))
        if setting == _DUMMY:
            data.update(self._dummy_fields(images, kwargs))
        else:
            data.update(self._fields(self._kept(images, decided, setting, kwargs)))
        return data

    def _kept(
        self, images: list[Any], decided: list[Decided], setting: str, kwargs: Mapping[str, object]
    ) -> list[Kept]:
        """What stays of each image, as it was decided."""
        if all(image.kept is not None for image in decided):
            return [cast(Kept, image.kept) for image in decided]
        # nothing is to be dropped, or vLLM's cache let go of one since
        kept = self._select(images, [image.key for image in decided], setting, kwargs)
        for image, now in zip(decided, kept, strict=True):
            image.confirm(now)
        return kept

    def _select(
        self, images: list[Any], keys: list[str], setting: str, kwargs: Mapping[str, object]
    ) -> list[Kept]:
        settings = self._settings(setting)
        outputs = self._encode(images, keys, needs_of([settings]), kwargs)
        return select(outputs, keys, settings, self.relevance(outputs, settings))

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        _, _, kwargs = _taken(hf_processor_mm_kwargs)
        config = dict(super()._get_mm_fields_config(hf_inputs, kwargs))  # type: ignore[safe-super]
        if KEPT in hf_inputs:
            config[EMBEDDINGS] = MultiModalFieldConfig.batched("image")
            # on the CPU: it is all the worker is given of an item that the prefix cache covers
            # (`vllm.multimodal.utils.strip_covered_mm_data`), and positions are computed from it
            config[KEPT] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return config

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        """As many places as the item has embeddings: the one place where the two are made equal."""
        _, _, kwargs = _taken(hf_processor_mm_kwargs)
        return thinned(
            super()._get_prompt_updates(mm_items, kwargs, out_mm_kwargs),  # type: ignore[safe-super]
            out_mm_kwargs,
            self.family,
        )

    def _maybe_apply_prompt_updates(self, mm_items: MultiModalDataItems, mm_res: Any) -> Any:
        details = [updates[0].content for updates in mm_res.prompt_updates.get("image", ())]
        ours = [d for d in details if isinstance(d, ThinnedDetails)]
        self._refuse_long_positions(sum(d.gap for d in ours))
        given = (int(embed_mask(d).sum()) for d in details if not isinstance(d, ThinnedDetails))
        # `apply` is given these very items
        setattr(mm_items, VISION_TOKENS, sum(d.places for d in ours) + sum(given))
        return super()._maybe_apply_prompt_updates(mm_items, mm_res)

    def _refuse_long_positions(self, gap: int) -> None:
        """An index past the rotary table would end the engine, and all other requests with it."""
        longest = self.info.ctx.model_config.max_model_len
        table = self.family.table(longest)
        if table is not None and longest + gap > table:
            raise VLLMValidationError(
                f"The images' dropped tokens leave gaps of {gap} positions, more than the model's rotary "
                "embedding has room for: prune less, or send fewer images.",
                parameter=KWARG,
            )

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> ProcessorInputs:
        """Profiling inputs: the largest number of tokens a request can have, so nothing is pruned."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        return dataclasses.replace(
            inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KWARG: _DUMMY}
        )

    def tower_output(
        self, image: Any, settings: VisionSettings, media_io_kwargs: Mapping[str, Any] | None = None
    ) -> tuple[TowerOutput, str]:
        """What selection is given for one image, and its content key, through the tower and cache of serving.

        Args:
            image: a PIL image, alone or as vLLM's media connector wraps it.
            settings: decide which optional outputs the tower computes.
            media_io_kwargs: with which the image was decoded; they are part of its key in the cache.

        Raises:
            ValueError: the image cannot be preprocessed.
        """
        items = self.info.parse_mm_data({"image": [image]})
        inputs = ProcessorInputs([], items, media_io_kwargs=media_io_kwargs or {})
        keys = self._content_keys(inputs)
        shown = dataclasses.replace(
            settings, keep_ratio=0.5, aggressiveness=None
        )  # the score, whatever stays
        (output,) = self._encode(_raw_images(items), keys, needs_of([shown]), {})
        return output, keys[0]

    def relevance(self, outputs: Sequence[TowerOutput], settings: VisionSettings) -> list[Tensor | None]:
        """Per image how relevant each unit is to the settings' question; empty where there is none."""
        if not settings.question or self.rater is None or not get_method(settings.method).reads_question:
            return []
        return [self.rater.rate(output, settings.question) for output in outputs]

    def warm_up(self) -> None:
        """Load all of stage 1 and run a picture through it, so that what does not fit fails at start.

        Raises:
            CheckpointError: tower or projector cannot be loaded from the checkpoint.
            ValueError: the adapter does not fit the checkpoint.
            PolicyError: the text tower cannot be loaded.
        """
        _ = self.rater
        images = [Image.new("RGB", (224, 224), "gray")]
        self._fields(select(self._encode(images, ["0"], frozenset(), {}), ["0"], VisionSettings()))

    @cached_property
    def vision(self) -> VisionService | SharedTower:
        """The process's tower, or its access to a shared one; loaded on first use."""
        return vision_service(self.info.ctx.model_config)

    @cached_property
    def rater(self) -> QuestionRater | None:
        """What rates questions; loaded on first use."""
        model_config = self.info.ctx.model_config
        context = plugin_context(model_config)
        return question_rater(
            self.family,
            self.vision.project,
            self.info.get_tokenizer(),
            model_config.model,
            device=self.vision.device,
            text_tower=context.policy.text_tower,
            revision=model_config.revision,
            download_dir=context.download_dir,
            dummy=context.dummy_weights,
        )

    @cached_property
    def family(self) -> Family:
        """The model's adapter."""
        return family_of(self.info.ctx.model_config.hf_config)

    def _default_setting(self) -> str:
        return plugin_context(self.info.ctx.model_config).policy.default_settings.vision.canonical()

    def _settings(self, setting: str) -> VisionSettings:
        operators = plugin_context(self.info.ctx.model_config).policy.score
        return for_family(VisionSettings.from_canonical(setting), self.family, operators)

    def _fields(self, images: Sequence[Kept]) -> dict[str, Any]:
        """The images' fields in vLLM's items: what computes positions, embeddings and masks."""
        projected = self.vision.project(images)
        model_config = self.info.ctx.model_config
        # torch_shm shares device tensors with the worker; every other transport copies host bytes
        on_device = model_config.get_multimodal_config().mm_tensor_ipc == "torch_shm"
        dtype = cast(torch.dtype, model_config.dtype)
        given = [e for e, _ in projected]
        # in memory of their own: a view would keep the whole request's for as long as one image is cached
        cached = [kept.output.patches for kept in images]
        embeddings = (
            [e.to(dtype, copy=True) for e in given] if on_device else to_host(given, dtype, lent=cached)
        )
        places = to_host([p for _, p in projected])
        masks = [_mask(kept.output.places, where) for kept, where in zip(images, places, strict=True)]
        return _by_name([kept.output.on_host for kept in images], embeddings, masks)

    def _dummy_fields(self, images: list[Any], kwargs: Mapping[str, object]) -> dict[str, Any]:
        items = self._items(images, kwargs)
        dtype = cast(torch.dtype, self.info.ctx.model_config.dtype)
        embeddings = [torch.zeros((i.places, self.family.embed_width()), dtype=dtype) for i in items]
        masks = [torch.ones(item.places, dtype=torch.bool) for item in items]
        return _by_name([item.on_host for item in items], embeddings, masks)

    def _encode(
        self, images: list[Any], keys: list[str], needs: frozenset[str], kwargs: Mapping[str, object]
    ) -> list[TowerOutput]:
        def prepare(positions: list[int]) -> list[Item]:
            return self._items([images[i] for i in positions], kwargs)

        return self.vision.encode(keys, prepare, needs)

    def _items(self, images: list[Any], kwargs: Mapping[str, object]) -> list[Item]:
        """Per image the fields that the model's own class would be given, and its places.

        All of it is the base class's: its preprocessing, its fields and, where pictures differ, its prompt
        update. `thin` compares the places with that again.
        """
        image_processor = getattr(self.info.get_hf_processor(**kwargs), "image_processor", None)
        looked_at = [
            self.family.bounded(image, image_processor) if isinstance(image, Image.Image) else image
            for image in images
        ]
        if all(map(_upright, looked_at)):
            # as the parser would give it, less a copy of each picture (`ImageOps.exif_transpose`)
            mm_items = MultiModalDataItems({"image": ImageProcessorItems(looked_at)})
        else:
            mm_items = self.info.parse_mm_data({"image": looked_at}, validate=False)
        data = super()._apply_hf_processor_main(mm_items, kwargs)
        fields = super()._get_mm_fields_config(data, kwargs)  # type: ignore[safe-super]
        base = MultiModalKwargsItems.from_hf_inputs(data, fields)
        places = self.family.places()
        if places is None:
            updates = super()._get_prompt_updates(mm_items, kwargs, base)  # type: ignore[safe-super]
            (update,) = (u for u in updates if u.modality == "image")
        items = []
        for i, item in enumerate(base["image"]):
            inputs = {name: torch.as_tensor(value) for name, value in item.get_data().items()}
            on_host = {name: value for name, value in inputs.items() if item[name].field.keep_on_cpu}
            items.append(Item(inputs, on_host, places_of(update, i) if places is None else places))
        return items


@lru_cache
def pruned_processor(base: type[BaseMultiModalProcessor[Any]]) -> type[PrunedProcessor]:
    """A model's own processor class with `PrunedProcessor` before it."""
    return cast(type[PrunedProcessor], type(f"Pruned{base.__name__}", (PrunedProcessor, base), {}))


def _taken(kwargs: Mapping[str, object]) -> tuple[str, list[Decided], dict[str, Any]]:
    """Setting, the images at hand, and the keyword arguments without them."""
    rest: dict[str, Any] = dict(kwargs)
    return str(rest.pop(KWARG, "off")), rest.pop(_IMAGES, []), rest


def _raw_images(items: MultiModalDataItems) -> list[Any]:
    """The decoded images; empty for text-only prompts and for embeddings given by the caller."""
    images = items.get("image")
    return list(images.get_all()) if isinstance(images, ImageProcessorItems) else []


def _upright(image: Any) -> bool:
    """Whether vLLM's parser (`MultiModalDataParser._parse_image_data`) leaves its pixels as they are."""
    return (
        isinstance(image, Image.Image)
        and image.mode == "RGB"
        and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    )


def _mask(places: int, kept: Tensor) -> Tensor:
    mask = torch.zeros(places, dtype=torch.bool)
    mask[kept] = True
    return mask


def _by_name(
    on_host: Sequence[Mapping[str, Tensor]], embeddings: list[Tensor], masks: list[Tensor]
) -> dict[str, Any]:
    # the base class computes with these, so they are stacked; the ragged ones stay lists
    shared = {name: torch.stack([fields[name] for fields in on_host]) for name in on_host[0]}
    return {**shared, EMBEDDINGS: embeddings, KEPT: masks}
