# SPDX-License-Identifier: Apache-2.0
"""Any multimodal class of vLLM without its vision tower: the processor delivers the embeddings that stay.

The decoder is the one vLLM builds; with a prune layer, `vllm_vtprune.models.decoder` cuts it there.

Three seams are the same in all of them: `SupportsMultiModal._mark_tower_model`, in which every class builds
its tower and projector; `embed_multimodal`, which turns an item's fields into embeddings; and
`SupportsMRoPE.get_mrope_input_positions` where positions have three dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn
from vllm.model_executor.models.utils import collect_children, no_init_weights
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor

from vllm_vtprune.context import plugin_context
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.models.positions import restore_positions
from vllm_vtprune.vision.placeholders import FIELDS
from vllm_vtprune.vision.processor import pruned_processor

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec

    from vllm_vtprune.kv_drop.bands import KVDropBands
    from vllm_vtprune.kv_drop.hooks.runner_v2 import KVDropModelState

M = TypeVar("M", bound=type)


class PrunedModel:
    """Mixin before a class of `vllm.model_executor.models`, by `pruned`.

    Where the start-up check found a checkpoint that the plugin does not prune, all of it does what the class
    behind it does.
    """

    # on by default for some models: the processor's tower would be given pixels that are not normalised
    supports_mm_device_do_normalize = False
    supports_tower_connector_lora = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if plugin_context(vllm_config.model_config).policy.has_prune_layer:
            from vllm_vtprune.models.decoder import split

            this: Any = self
            split(this.language_model.model, vllm_config)
            # on the instance: vLLM takes the attribute's presence for a model with a state of its own
            this.get_model_state_cls = _model_state_class

    @property
    def kv_drop(self) -> KVDropBands:
        """The second stage's present step, where there is a prune layer."""
        this: Any = self
        state: KVDropBands = this.language_model.model.kv_drop
        return state

    @contextmanager
    def _mark_tower_model(
        self, vllm_config: VllmConfig, modalities: set[str] | str, *, targets: Any = None
    ) -> Iterator[None]:
        """Build no tower, but for a modality that passes as it is and may be asked for."""
        if _needs_tower(vllm_config, {modalities} if isinstance(modalities, str) else modalities):
            with super()._mark_tower_model(vllm_config, modalities, targets=targets):  # type: ignore[misc]
                yield
            return
        this: Any = self
        with (
            collect_children(this, targets=targets) as names,
            no_init_weights(this, TowerElsewhere, targets=targets),
        ):
            yield
        self._tower_model_names = names

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The processor's embeddings as they are, per image or video [k, E]."""
        # by the mask: embeddings given by a caller come without it, and in one piece
        for names in FIELDS.values():  # a call is about one modality
            if names.kept in kwargs:
                return list(kwargs[names.embeddings])
        return super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Asked only of classes whose positions have three dimensions."""
        return restore_positions(super().get_mrope_input_positions, input_tokens, mm_features)  # type: ignore[misc]


class TowerElsewhere(nn.Module):
    """Stands where the tower was, on no device; tells its attributes and reads past its weights.

    Like vLLM's `StageMissingLayer`, but no subclass of it: Qwen3-VL switches deepstack off where its tower is
    one.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not a child: it has no weights to load

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        """Never asked for."""
        raise RuntimeError("the vision tower runs in the processor, not in the engine")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Read past them: they are the processor's (`vision.checkpoint`)."""
        for _ in weights:
            pass
        return set()


def pruned(cls: M) -> M:
    """Class decorator for `class PrunedX(PrunedModel, X)`: X's own processor, with stage 1 before it.

    Hook: `_processor_factory`, which `MULTIMODAL_REGISTRY.register_processor` has set on X.
    """
    base = cls._processor_factory  # type: ignore[attr-defined]

    def make(info: Any, dummy_inputs: Any) -> BaseMultiModalProcessor[Any]:
        processor: BaseMultiModalProcessor[Any] = base.processor(info, dummy_inputs)
        if plugin_context(info.ctx.model_config).prunes:
            processor.__class__ = pruned_processor(type(processor))
        return processor

    register: Callable[[M], M] = MULTIMODAL_REGISTRY.register_processor(
        make, info=base.info, dummy_inputs=base.dummy_inputs
    )
    return register(cls)


def _needs_tower(vllm_config: VllmConfig, modalities: set[str]) -> bool:
    if not plugin_context(vllm_config.model_config).prunes:
        return True
    limits = vllm_config.model_config.get_multimodal_config()
    pruned = family_of(vllm_config.model_config.hf_config).modalities
    return any(limits.get_limit_per_prompt(modality) > 0 for modality in modalities - set(pruned))


def _model_state_class() -> type[KVDropModelState]:
    """The seam in Model Runner V2 (`vllm.v1.worker.gpu.model_states.resolve_model_state_cls`)."""
    from vllm_vtprune.kv_drop.hooks.runner_v2 import KVDropModelState

    return KVDropModelState
