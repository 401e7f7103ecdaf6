# SPDX-License-Identifier: Apache-2.0
"""What lmms-eval asks of a task: its picture, its question, and whether a reply is right."""

from __future__ import annotations

import re
from typing import Any

from PIL import Image


def pictures(document: dict[str, Any]) -> list[Image.Image]:
    """The question's picture."""
    return [Image.open(document["image"]).convert("RGB")]


def question(document: dict[str, Any]) -> str:
    """Its text."""
    return str(document["question"])


def judge(document: dict[str, Any], replies: list[str]) -> dict[str, float]:
    """1 for an answer, whatever its case and signs."""
    return {"right": float(_words(replies[0]) == _words(str(document["answer"])))}


def _words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9 ]", " ", text.lower()).split()
