# SPDX-License-Identifier: Apache-2.0
"""The question of a request: the text of its last user turn, for selection methods that read it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from vllm_vtprune.selection.registry import get_method
from vllm_vtprune.settings import PruneSettings


def with_question(settings: PruneSettings, text: str) -> PruneSettings:
    """The settings with the question, where their method reads one."""
    if not get_method(settings.vision.method).reads_question:
        return settings
    return replace(settings, vision=settings.vision.asking(text))


def question_of(messages: Iterable[Any]) -> str:
    """The text parts of the last user turn; empty without one.

    Args:
        messages: of a chat request, as vLLM's handlers hand them to the renderer: mappings or models, their
            content a string or a list of parts.
    """
    turns = [message for message in messages if _field(message, "role") == "user"]
    content = _field(turns[-1], "content") if turns else None
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Iterable) else ()
    texts = [part if isinstance(part, str) else _field(part, "text") for part in parts]
    return " ".join(text for text in texts if isinstance(text, str))


def _field(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
