# SPDX-License-Identifier: Apache-2.0
"""What one HTTP request asked for and what came of it, carried from the route to the renderer and back."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_vtprune.settings import HEADERS, Controls, PruneSettings, SettingsError
from vtprune_server import metrics


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


@dataclass(slots=True)
class RequestContext:
    """One HTTP request.

    Attributes:
        headers: the controls its `X-VTPrune-*` headers carry.
        body: the body's `vtprune` field, not yet validated.
        counts: what rendering its prompts came to; None until one was rendered.
    """

    headers: Controls = field(default_factory=Controls)
    body: Any = None
    counts: TokenCounts | None = None

    def add(self, counts: TokenCounts) -> None:
        """Record one rendered prompt."""
        if self.counts is None:
            self.counts = TokenCounts()
        self.counts.add(counts)


#: Set by the route for the duration of a request; tasks started in it inherit the same object.
current_request: ContextVar[RequestContext | None] = ContextVar("vtprune_request", default=None)
