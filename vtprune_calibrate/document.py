# SPDX-License-Identifier: Apache-2.0
"""The schedule file: what `vtprune serve --prune-schedule` reads, and where it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from vllm_vtprune.kv_drop.schedule import PruneLayer
from vllm_vtprune.version import __version__
from vtprune_eval.tasks import Questions


def data_hash(questions: Sequence[Questions]) -> str:
    """Of pictures, questions and answers, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in questions:
        for picture in part.pictures:
            digest.update(f"{picture.size}".encode())
            digest.update(picture.tobytes())
        for question in part.asked:
            digest.update(json.dumps([question.picture, question.text, question.answers]).encode())
    return digest.hexdigest()[:16]


def document(
    schedule: Sequence[PruneLayer], relevance: Sequence[str], layers: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The file's object.

    Args:
        schedule: the prune layers.
        relevance: the rating at each; the last holds for the rest.
        layers: decoder layers of the model.
        facts: everything else, `model` with `weights` among it.
    """
    ratings = [relevance[min(at, len(relevance) - 1)] for at in range(len(schedule))]
    return {
        "prune_layers": ",".join(map(str, schedule)),
        "relevance": ratings,
        "layers": layers,
        **facts_of_run(facts),
    }


def facts_of_run(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts, with what made them and when."""
    return {**facts, "version": f"vtprune {__version__}", "date": date.today().isoformat()}


def write(content: Mapping[str, Any], path: Path) -> Path:
    """Write the file whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return unfinished.replace(path)
