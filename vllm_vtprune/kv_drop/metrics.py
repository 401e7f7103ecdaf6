# SPDX-License-Identifier: Apache-2.0
"""Prometheus counters of stage 2 that follow from a prompt's plan.

They are counted in the API process, not by the scheduler, whose process vLLM does not scrape; `plan_prompt`
gives the same answer in both. Objects at module level appear at vLLM's ``/metrics``. The front end counts
tokens and unpruned requests itself.
"""

from __future__ import annotations

from prometheus_client import Counter

from vllm_vtprune.kv_drop.plan import PromptPlan

REQUESTS_PRUNED = Counter("vtprune_kv_requests_pruned", "Requests that lost tokens at the prune layer.")
BLOCKS_SAVED = Counter(
    "vtprune_kv_blocks_saved", "KV-cache blocks not allocated for dropped prompt tokens, all groups."
)


def count(plan: PromptPlan, *, block_size: int, groups_above: int) -> None:
    """Count one prompt on a server with a prune layer.

    Args:
        plan: its plan.
        block_size: tokens of a KV-cache block (`CacheConfig.block_size`).
        groups_above: KV-cache groups above the prune layer (`groups_above_prune_layer`).
    """
    if plan.dropped:
        REQUESTS_PRUNED.inc()
        BLOCKS_SAVED.inc(plan.blocks_saved(block_size, groups_above))


def groups_above_prune_layer(layers: int, prune_layer: int) -> int:
    """KV-cache groups vLLM makes of the layers above the prune layer.

    vLLM's rule (`_get_kv_cache_groups_uniform_page_size`, which calls it a heuristic): groups as large as the
    smaller half, or as the larger where that is less than 1.5 times the smaller.

    Args:
        layers: decoder layers.
        prune_layer: K.
    """
    below, above = prune_layer, layers - prune_layer
    small, large = min(below, above), max(below, above)
    size = large if large < 1.5 * small else small
    return -(-above // size)
