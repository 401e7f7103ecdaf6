# SPDX-License-Identifier: Apache-2.0
"""Prometheus counters of stage 2 that follow from a prompt's plan.

They are counted in the API process, not by the scheduler, whose process vLLM does not scrape; `plan_prompt`
gives the same answer in both. Objects at module level appear at vLLM's ``/metrics``. The front end counts
tokens and unpruned requests itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import Counter

from vllm_vtprune.kv_drop.plan import PromptPlan

REQUESTS_PRUNED = Counter("vtprune_kv_requests_pruned", "Requests that lost tokens at a prune layer.")
BLOCKS_SAVED = Counter(
    "vtprune_kv_blocks_saved", "KV-cache blocks not allocated for dropped prompt tokens, all groups."
)
BAND_TOKENS = Counter(
    "vtprune_kv_band_tokens",
    "Prompt tokens that the decoder layers above a prune layer, up to the next, hold.",
    ["prune_layer"],
)
GATE_DECISIONS = Counter(
    "vtprune_kv_gate_decisions",
    "Answers on whose prompt the gate decided, by whether the visual tokens leave or stay.",
    ["decision"],
)
LEAVE, STAY = "leave", "stay"
for _decision in (LEAVE, STAY):  # there from the start, so that a rate sees the first
    GATE_DECISIONS.labels(_decision)


def count(plan: PromptPlan, *, block_size: int, groups: Sequence[int]) -> None:
    """Count one prompt on a server with a prune layer.

    Args:
        plan: its plan.
        block_size: tokens of a KV-cache block (`CacheConfig.block_size`).
        groups: KV-cache groups of the band above each prune layer
        (`vllm_vtprune.kv_drop.schedule.band_groups`).
    """
    if plan.dropped:
        REQUESTS_PRUNED.inc()
        BLOCKS_SAVED.inc(plan.blocks_saved(block_size, groups))
