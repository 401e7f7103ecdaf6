# SPDX-License-Identifier: Apache-2.0
"""Tokens of a request before and after pruning, in the forms the contract gives them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest


@dataclass(slots=True)
class TokenCounts:
    """Tokens before and after pruning, summed over the prompts of one request.

    Attributes:
        kv_tokens: prompt tokens.
        kv_tokens_kept: above the first prune layer.
        kv_tokens_by_layer: above each prune layer, from the lowest up; empty on a server without one.
    """

    vision_tokens: int = 0
    vision_tokens_kept: int = 0
    kv_tokens: int = 0
    kv_tokens_kept: int = 0
    kv_tokens_by_layer: tuple[int, ...] = ()

    def add(self, other: TokenCounts) -> None:
        """Add another prompt's counts."""
        self.vision_tokens += other.vision_tokens
        self.vision_tokens_kept += other.vision_tokens_kept
        self.kv_tokens += other.kv_tokens
        self.kv_tokens_kept += other.kv_tokens_kept
        pairs = zip_longest(self.kv_tokens_by_layer, other.kv_tokens_by_layer, fillvalue=0)
        self.kv_tokens_by_layer = tuple(a + b for a, b in pairs)

    @property
    def drops(self) -> bool:
        """Whether a token left, at either stage."""
        least = min((self.kv_tokens_kept, *self.kv_tokens_by_layer))
        return self.vision_tokens_kept < self.vision_tokens or least < self.kv_tokens

    def as_usage(self) -> dict[str, int | list[int]]:
        """The `usage.vtprune` object; what lies above each prune layer only where there are several."""
        several = len(self.kv_tokens_by_layer) > 1
        by_layer = {"kv_tokens_kept_by_layer": list(self.kv_tokens_by_layer)} if several else {}
        return {
            "vision_tokens": self.vision_tokens,
            "vision_tokens_kept": self.vision_tokens_kept,
            "kv_tokens": self.kv_tokens,
            "kv_tokens_kept": self.kv_tokens_kept,
            **by_layer,
        }

    def as_headers(self) -> dict[str, str]:
        """The `X-VTPrune-*` response headers."""
        return {
            "X-VTPrune-Vision-Tokens": str(self.vision_tokens),
            "X-VTPrune-Vision-Tokens-Kept": str(self.vision_tokens_kept),
            "X-VTPrune-KV-Tokens": str(self.kv_tokens),
            "X-VTPrune-KV-Tokens-Kept": str(self.kv_tokens_kept),
        }
