# SPDX-License-Identifier: Apache-2.0
"""Tokens of a request before and after pruning, in the forms the contract gives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class TokenCounts:
    """Tokens before and after pruning, summed over the prompts of one request."""

    vision_tokens: int = 0
    vision_tokens_kept: int = 0
    kv_tokens: int = 0
    kv_tokens_kept: int = 0

    def add(self, other: TokenCounts) -> None:
        """Add another prompt's counts."""
        self.vision_tokens += other.vision_tokens
        self.vision_tokens_kept += other.vision_tokens_kept
        self.kv_tokens += other.kv_tokens
        self.kv_tokens_kept += other.kv_tokens_kept

    def as_usage(self) -> dict[str, int]:
        """The `usage.vtprune` object."""
        return {
            "vision_tokens": self.vision_tokens,
            "vision_tokens_kept": self.vision_tokens_kept,
            "kv_tokens": self.kv_tokens,
            "kv_tokens_kept": self.kv_tokens_kept,
        }

    def as_headers(self) -> dict[str, str]:
        """The `X-VTPrune-*` response headers."""
        return {
            "X-VTPrune-Vision-Tokens": str(self.vision_tokens),
            "X-VTPrune-Vision-Tokens-Kept": str(self.vision_tokens_kept),
            "X-VTPrune-KV-Tokens": str(self.kv_tokens),
            "X-VTPrune-KV-Tokens-Kept": str(self.kv_tokens_kept),
        }
