# SPDX-License-Identifier: Apache-2.0
"""What the forward pass does at a prune layer: rate the rows of a batch, then keep as many as planned."""

from __future__ import annotations

from typing import Any

import torch

from vllm_vtprune.kv_drop.relevance import PrunedPrompts, keep, rate


def kept_rows(q: torch.Tensor, k: torch.Tensor, prompts: PrunedPrompts, **rating: Any) -> torch.Tensor:
    """Rows that go on above the prune layer, [rows_kept]; arguments as of `rate`."""
    scores = rate(q, k, prompts, **rating) if prompts.buckets else None
    return keep(scores, prompts.protected, prompts)
