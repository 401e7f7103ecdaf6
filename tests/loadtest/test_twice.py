# SPDX-License-Identifier: Apache-2.0
"""A load test run twice against a real server: the second measures work again, or says that it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.client import metric
from vtprune_loadtest.__main__ import main

pytestmark = pytest.mark.engine
REQUESTS = 6


def run(server: str, folder: Path, *more: str) -> tuple[dict[str, Any], float]:
    """The result, and how many pictures the tower looked at for it."""
    before = metric(server, "vtprune_tower_batch_size_sum")
    command = ["--base-url", server, "--num-prompts", str(REQUESTS), "--concurrency", "2", "--warmup", "1"]
    command += ["--image-size", "96", "--output-len", "2", "--no-plots", "--result-dir", str(folder), *more]
    assert main(command) == 0
    document = json.loads((folder / "result.json").read_text())
    return document, metric(server, "vtprune_tower_batch_size_sum") - before


def hits(document: dict[str, Any]) -> dict[str, Any]:
    (point,) = document["load_points"]
    found: dict[str, Any] = point["cache_use"]
    return found


def test_the_second_run_sends_other_pictures(server: str, tmp_path: Path) -> None:
    (first, worked), (second, worked_again) = run(server, tmp_path / "1"), run(server, tmp_path / "2")
    assert worked == worked_again == REQUESTS + 1
    assert not hits(first)["beyond_what_was_asked"] and not hits(second)["beyond_what_was_asked"]
    assert first["arguments"]["seed"] != second["arguments"]["seed"]
    assert not [note for note in second["notes"] if "cache" in note]
    assert second["results"][0]["completed"] == REQUESTS


def test_the_same_pictures_again_are_told(server: str, tmp_path: Path) -> None:
    seed = ("--seed", "8161")
    (first, worked), (second, worked_again) = (
        run(server, tmp_path / "1", *seed),
        run(server, tmp_path / "2", *seed),
    )
    assert (worked, worked_again) == (REQUESTS + 1, 0)
    assert not hits(first)["beyond_what_was_asked"]
    assert hits(second)["beyond_what_was_asked"]
    assert [note for note in second["notes"] if "sent again" in note]
