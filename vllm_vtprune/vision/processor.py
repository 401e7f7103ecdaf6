# SPDX-License-Identifier: Apache-2.0
"""Stage 1 inside vLLM's multimodal processor, whatever the model.

vLLM sizes the placeholders here, before the scheduler sees the request, so this is where the exact number of
kept tokens must be known. Hooks, all of `vllm.multimodal.processing.BaseMultiModalProcessor` in vLLM 0.32:
`_cached_apply_hf_processor`, `_get_mm_hashes`, `_get_cache_missing_processor_kwargs`,
`_apply_hf_processor_main`, `_get_mm_fields_config`, `_get_prompt_updates`, `_maybe_apply_prompt_updates`,
`apply` and `get_dummy_inputs`.

An image's way, and a video's: content key (`vision.keys`) -> (tower's output, from the cache or by
`vision.preprocessing` and `vision.service`) -> selection -> the item's key (`vision.outcomes`) -> embeddings
and the mask of the places that stay (`vision.embeddings`) -> the base class's placeholder, thinned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate
from vllm.multimodal.processing.inputs import ProcessorInputs

from vllm_vtprune.context import plugin_context
from vllm_vtprune.contract import KWARG
from vllm_vtprune.families.base import Family, Item, Kept, TowerOutput
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.selection.registry import get_method
from vllm_vtprune.settings import VisionSettings
from vllm_vtprune.vision.embeddings import blank, embedded
from vllm_vtprune.vision.features import for_family, needs_of, select
from vllm_vtprune.vision.keys import MediaKeys
from vllm_vtprune.vision.outcomes import Decided
from vllm_vtprune.vision.placeholders import FIELDS, ThinnedDetails, embed_mask, field_configs, thinned
from vllm_vtprune.vision.placement import vision_service
from vllm_vtprune.vision.preprocessing import Preprocessing
from vllm_vtprune.vision.question import QuestionRater, question_rater

if TYPE_CHECKING:
    from vllm_vtprune.vision.service import VisionService
    from vllm_vtprune.vision.shared.client import SharedTower

#: The images and videos at hand (`Decided`, by modality), handed from hook to hook inside the processor's
#: keyword arguments.
_MEDIA = "vtprune_media"
#: Settings of the dummy images with which vLLM sizes its buffers: they count unpruned and run no tower.
_DUMMY = "dummy"
#: Key of a processed prompt: its vision tokens before pruning.
VISION_TOKENS = "vtprune_vision_tokens"


class PrunedProcessor(BaseMultiModalProcessor[Any]):
    """Replaces an image's or a video's pixels by the embeddings of the vision tokens that stay.

    Videos of a family that does not prune them pass as they are.

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
        # images named by a trusted id need not be there at all: the processor sorts that out
        if policy.feature_cache_gb == 0 or policy.trust_image_ids or not self.keys.decoded(items):
            return 0, 0
        inputs = self._prepared(
            ProcessorInputs(
                [],
                items,
                hf_processor_mm_kwargs=mm_processor_kwargs or {},
                media_io_kwargs=media_io_kwargs or {},
            )
        )
        setting, decided, _ = _taken(inputs.hf_processor_mm_kwargs)
        if cache is not None:
            hashes = self._get_mm_hashes(inputs)
            if all(all(cache.is_cached(hashes[modality])) for modality in decided):
                return 0, 0
        media = [one for many in decided.values() for one in many]
        needs = needs_of([self._settings(setting)])
        keys = {one.key for one in media}
        hits = self.vision.available(keys, needs)
        self.encode(media, needs)
        return hits, len(keys) - hits

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
        """The inputs with the setting, and each image and video, among their keyword arguments.

        What stays of an image is what stayed of it last, where this process knows.
        """
        kwargs: dict[str, Any] = {KWARG: self._default_setting(), **inputs.hf_processor_mm_kwargs}
        setting = kwargs[KWARG]
        media = {} if setting == _DUMMY else self.keys.keyed(inputs)
        for one in (one for many in media.values() for one in many):
            one.outcome = self.vision.outcomes.get(one.key, setting)
        return dataclasses.replace(inputs, hf_processor_mm_kwargs={**kwargs, _MEDIA: media})

    def _decide(self, inputs: ProcessorInputs) -> None:
        """Select for every image and video that vLLM's cache does not hold as it was decided last."""
        setting, decided, _ = _taken(inputs.hf_processor_mm_kwargs)
        if not decided or self._settings(setting).keeps_all:
            return
        # as vLLM decides whether to use it (`BaseMultiModalProcessor._cached_apply_hf_processor`)
        given = any(items.get_passthrough_data() for items in inputs.mm_data_items.values())
        cache = None if given else inputs.cache
        media = [one for many in decided.values() for one in many]
        undecided: dict[str, Decided] = {}
        for one in media:
            # a trusted id may stand for an image that is not there
            held = (
                cache is not None and one.outcome and cache.is_cached_item(self.keys.item_key(one, setting))
            )
            if not held and one.raw is not None:
                undecided[one.key] = one
        if not undecided:
            return
        kept = dict(zip(undecided, self._select(list(undecided.values()), setting), strict=True))
        for one in media:
            if one.key in kept:
                self.vision.outcomes.put(one.key, setting, one.decide(kept[one.key]))

    # --- keys in vLLM's caches ---------------------------------------------------------------------------

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Mapping[str, list[str]]:
        setting, decided, kwargs = _taken(inputs.hf_processor_mm_kwargs)
        items = inputs.mm_data_items
        ours = {
            modality: [self.keys.item_key(one, setting) for one in media]
            for modality, media in decided.items()
        }
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
        missing = {
            modality: [one for one, hit in zip(media, mm_is_cached[modality], strict=True) if not hit]
            for modality, media in decided.items()
        }
        base = super()._get_cache_missing_processor_kwargs(stripped, dict(mm_is_cached))
        return {**base, KWARG: setting, _MEDIA: missing}

    # --- pixels to embeddings ----------------------------------------------------------------------------

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        # neither key may reach the Hugging Face processor, which warns about or chokes on unknown ones
        setting, decided, kwargs = _taken(hf_kwargs)
        ours = self.keys.decoded(mm_items)
        if not ours:
            return super()._apply_hf_processor_main(mm_items, kwargs)
        others = {m: items for m, items in mm_items.items() if m not in ours and len(items)}
        data = BatchFeature()
        if others:
            data.update(super()._apply_hf_processor_main(MultiModalDataItems(others), kwargs))
        for modality, media in ours.items():
            if setting == _DUMMY:
                dummies = [Decided("", raw, kwargs, modality) for raw in media]
                data.update(self._dummy_fields(modality, dummies))
            else:
                data.update(self._fields(modality, self._kept(decided[modality], setting)))
        return data

    def _kept(self, media: list[Decided], setting: str) -> list[Kept]:
        """What stays of each image, as it was decided."""
        if all(one.kept is not None for one in media):
            return [cast(Kept, one.kept) for one in media]
        # nothing is to be dropped, or vLLM's cache let go of one since
        kept = self._select(media, setting)
        for one, now in zip(media, kept, strict=True):
            one.confirm(now)
        return kept

    def _select(self, media: Sequence[Decided], setting: str) -> list[Kept]:
        settings = self._settings(setting)
        outputs = self.encode(media, needs_of([settings]))
        keys = [one.key for one in media]
        return select(outputs, keys, settings, self.relevance(outputs, settings))

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        _, _, kwargs = _taken(hf_processor_mm_kwargs)
        config = dict(super()._get_mm_fields_config(hf_inputs, kwargs))  # type: ignore[safe-super]
        return {**config, **field_configs(hf_inputs)}

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
        details = [
            updates[0].content for modality in FIELDS for updates in mm_res.prompt_updates.get(modality, ())
        ]
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
                f"The dropped vision tokens leave gaps of {gap} positions, more than the model's rotary "
                "embedding has room for: prune less, or send fewer images or shorter videos.",
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

    # --- tower and selection -----------------------------------------------------------------------------

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
        image = Decided("0", Image.new("RGB", (224, 224), "gray"))
        self._fields("image", select(self.encode([image], frozenset()), ["0"], VisionSettings()))

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

    @cached_property
    def keys(self) -> MediaKeys:
        """What names the model's images and videos."""
        return MediaKeys(super(), self.info, self.family)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What the model's own processor makes of them."""
        return Preprocessing(super(), self.info, self.family)

    def _default_setting(self) -> str:
        return plugin_context(self.info.ctx.model_config).policy.default_settings.vision.canonical()

    def _settings(self, setting: str) -> VisionSettings:
        operators = plugin_context(self.info.ctx.model_config).policy.score
        return for_family(VisionSettings.from_canonical(setting), self.family, operators)

    def _fields(self, modality: str, media: Sequence[Kept]) -> dict[str, Any]:
        return embedded(modality, media, self.vision, self.info.ctx.model_config)

    def _dummy_fields(self, modality: str, media: Sequence[Decided]) -> dict[str, Any]:
        dtype = cast(torch.dtype, self.info.ctx.model_config.dtype)
        return blank(modality, self.preprocessing.items(media), self.family.embed_width(), dtype)

    def encode(self, media: Sequence[Decided], needs: frozenset[str]) -> list[TowerOutput]:
        """The tower's outputs of some images and videos, from its cache or by a pass.

        Args:
            media: keyed (`MediaKeys.keyed`).
            needs: the optional outputs wanted (`families.base.OPTIONAL_OUTPUTS`).

        Raises:
            ValueError: one cannot be preprocessed.
        """

        def prepare(positions: list[int]) -> list[Item]:
            return self.preprocessing.items([media[i] for i in positions])

        return self.vision.encode([one.key for one in media], prepare, needs)


@lru_cache
def pruned_processor(base: type[BaseMultiModalProcessor[Any]]) -> type[PrunedProcessor]:
    """A model's own processor class with `PrunedProcessor` before it."""
    return cast(type[PrunedProcessor], type(f"Pruned{base.__name__}", (PrunedProcessor, base), {}))


def _taken(kwargs: Mapping[str, object]) -> tuple[str, dict[str, list[Decided]], dict[str, Any]]:
    """Setting, the media at hand, and the keyword arguments without them."""
    rest: dict[str, Any] = dict(kwargs)
    return str(rest.pop(KWARG, "off")), rest.pop(_MEDIA, {}), rest
