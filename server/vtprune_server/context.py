# SPDX-License-Identifier: Apache-2.0
"""What one HTTP request asked for and what came of it, carried from the route to the renderer and back."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import VLLMValidationError

from vllm_vtprune.contract import FIELDS, KWARG
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.kv_drop.plan import PromptPlan
from vllm_vtprune.settings import Controls, PruneSettings
from vtprune_server import metrics
from vtprune_server.counts import TokenCounts
from vtprune_server.kv_plan import KVPlanner


@dataclass(slots=True)
class RequestContext:
    """One HTTP request.

    Attributes:
        headers: the controls its `X-VTPrune-*` headers carry.
        body: the body's `vtprune` field, not yet validated.
        model: the body's model name, on routes that hide it from the handler.
        settings: what they were resolved to; None until a prompt was rendered.
        counts: what rendering its prompts came to; None until one was rendered.
        kv_planner: the server's; None without a prune layer.
        plans: what it does to each prompt.
    """

    headers: Controls = field(default_factory=Controls)
    body: Any = None
    model: str | None = None
    settings: PruneSettings | None = None
    counts: TokenCounts | None = None
    kv_planner: KVPlanner | None = None
    plans: list[PromptPlan] = field(default_factory=list)

    @property
    def unpruned(self) -> str | None:
        """Why the second stage served a prompt whole that asked for less; None otherwise."""
        return next((plan.unpruned for plan in self.plans if plan.unpruned is not None), None)

    def add(self, counts: TokenCounts) -> None:
        """Record one rendered prompt."""
        if self.counts is None:
            self.counts = TokenCounts()
        self.counts.add(counts)


#: Set by the route for the duration of a request; tasks started in it inherit the same object.
current_request: ContextVar[RequestContext | None] = ContextVar("vtprune_request", default=None)

_FIELDS = {field.header.lower(): field.name for field in FIELDS.values()} | {
    f"{KWARG}.{name}": name for name in FIELDS
}


def refusal(error: SettingsError) -> VLLMValidationError:
    """Count settings that cannot be served; the error to raise for them, which vLLM answers as a 400."""
    # a client's spelling must not become a label: only the contract's names do
    metrics.REJECTED.labels(_FIELDS.get((error.param or "").lower(), "unknown")).inc()
    return VLLMValidationError(str(error), parameter=error.param)
