# SPDX-License-Identifier: Apache-2.0
"""KV-cache specs and block managers: layers above a prune layer hold blocks for kept tokens only.

Hooks, all of vLLM 0.32: `KVCacheSpecRegistry.register` (made for out-of-tree specs), and of
`vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager` the methods `get_num_blocks_to_allocate`,
`allocate_new_blocks` and `cache_blocks`, which reads of a request no more than `reuse.NamedBlocks` has.
All specs are full attention to all of vLLM; those of different bands only refuse to merge with each other, so
that vLLM (`get_kv_cache_groups`) puts each band of the decoder into groups of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Self, cast

from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_vtprune.kv_drop.hooks.reuse import Passages
from vllm_vtprune.kv_drop.plan import PromptPlan


@dataclass(frozen=True, kw_only=True)
class _BandSpec(FullAttentionSpec):
    """Cache of a layer of one band.

    Attributes:
        band: how many prune layers are below the layer.
    """

    band: int = 0

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """`FullAttentionSpec.merge`, for layers of the same band alone.

        Raises:
            AssertionError: the layers are of several bands; vLLM's grouping asks by catching this.
        """
        if not all(type(spec) is cls and spec.band == specs[0].band for spec in specs):
            raise AssertionError("Layers below and above a prune layer share no KV-cache group.")
        # vLLM rebuilds the spec from the fields it knows
        return replace(super().merge(specs), band=specs[0].band)


@dataclass(frozen=True, kw_only=True)
class BelowPruneLayerSpec(_BandSpec):
    """Cache of a layer that sees every prompt token."""


@dataclass(frozen=True, kw_only=True)
class AbovePruneLayerSpec(_BandSpec):
    """Cache of a layer that sees kept tokens only."""


class PlannedBlocksManager(FullAttentionManager):
    """Full attention that publishes no blocks of pruned requests, or under other names.

    Attributes:
        plans: pruned requests by id; `KVDropScheduler` puts its own mapping here.
        passages: what later turns go on from; `KVDropScheduler` puts its own here, where they do.
    """

    plans: Mapping[str, PromptPlan] = MappingProxyType({})
    passages: Passages | None = None

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publish full blocks for prefix caching; those of a pruned request for its later turns alone."""
        if request.request_id not in self.plans:
            super().cache_blocks(request, num_tokens, *args, **kwargs)
        elif self.passages is not None and request.request_id in self.passages:
            lost = self.dropped(request.request_id)
            slots = num_tokens - lost
            if slots // self.block_size > self.num_cached_block.get(request.request_id, 0):
                named: Any = self.passages.names(request, lost)
                super().cache_blocks(named, slots, *args, **kwargs)

    def dropped(self, request_id: str) -> int:
        """Tokens of the request that left below this group's layers."""
        plan, spec = self.plans.get(request_id), cast(_BandSpec, self.kv_cache_spec)
        return 0 if plan is None or not spec.band else plan.tokens - plan.kept_by_layer[spec.band - 1]

    def return_surplus(self, request_id: str, num_tokens: int) -> int:
        """How many blocks the request holds: below a prune layer there is never a surplus."""
        return len(self.req_to_blocks.get(request_id, ()))


class BelowPruneLayerManager(PlannedBlocksManager):
    """Blocks of the layers that see every prompt token."""


class AbovePruneLayerManager(PlannedBlocksManager):
    """Blocks of the layers above: none for tokens that were dropped."""

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Blocks missing for `num_tokens` tokens of the request, the dropped ones not counted."""
        return super().get_num_blocks_to_allocate(
            request_id, self._slots(request_id, num_tokens), *args, **kwargs
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Blocks for `num_tokens` tokens of the request, the dropped ones not counted."""
        slots = self._slots(request_id, num_tokens)
        return super().allocate_new_blocks(request_id, slots, num_tokens_main_model)

    def return_surplus(self, request_id: str, num_tokens: int) -> int:
        """Give the blocks beyond those for `num_tokens` tokens back to the pool, at once.

        The worker has not written to them since the decision that made them a surplus, and will not.

        Returns:
            How many the request still holds.
        """
        blocks = self.req_to_blocks.get(request_id, [])
        if not blocks:
            return 0
        needed = -(-self._slots(request_id, num_tokens) // self.block_size)
        surplus = blocks[needed:]
        del blocks[needed:]
        self.block_pool.free_blocks(reversed(surplus))
        return len(blocks)

    def _slots(self, request_id: str, num_tokens: int) -> int:
        plan = self.plans.get(request_id)
        if plan is None:
            return num_tokens
        if num_tokens < plan.tokens:
            raise RuntimeError(
                f"Request {request_id} was scheduled for {num_tokens} of its {plan.tokens} prompt tokens, "
                "but a pruned prompt cannot be split."
            )
        return num_tokens - self.dropped(request_id)


def split_specs(specs: Mapping[str, KVCacheSpec], *prune_layers: int) -> dict[str, KVCacheSpec]:
    """Give the layers of each band of the decoder the band's spec.

    Args:
        specs: layer name -> spec, as vLLM's model runner reports them.
        *prune_layers: each K; layers of index K and more are above it.

    Raises:
        ValueError: a layer that is not full attention.
    """
    split: dict[str, KVCacheSpec] = {}
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec:
            raise ValueError(
                f"vtprune's second stage needs full-attention layers, and {name} has {type(spec).__name__}: "
                "leave prune_layer out."
            )
        band = sum(extract_layer_index(name) >= layer for layer in prune_layers)
        split[name] = replace_as(spec, AbovePruneLayerSpec if band else BelowPruneLayerSpec, band=band)
    return split


def groups_above(specs: Sequence[KVCacheSpec]) -> list[tuple[int, int]]:
    """The KV-cache groups above a prune layer: index of the group, and of the prune layer next below."""
    return [(i, spec.band - 1) for i, spec in enumerate(specs) if isinstance(spec, AbovePruneLayerSpec)]


# At import: vLLM's engine-core process gets the specs pickled from the workers, which imports this module
# there, and groups them next. Registering into an empty table would keep vLLM from filling in its own specs.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(BelowPruneLayerSpec, BelowPruneLayerManager, BelowPruneLayerSpec)
KVCacheSpecRegistry.register(AbovePruneLayerSpec, AbovePruneLayerManager, AbovePruneLayerSpec)
