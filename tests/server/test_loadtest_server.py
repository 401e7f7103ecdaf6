# SPDX-License-Identifier: Apache-2.0
"""The load tester on the real server: what it sweeps acts, and a second run with the same seed is told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vtprune_loadtest.__main__ import main


@pytest.mark.engine
def test_a_load_test_run_twice_says_what_the_caches_answered(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--base-url",
        server,
        "--sweep",
        "off,aggressive",
        "--num-prompts",
        "6",
        "--concurrency",
        "2",
    ]
    arguments += [
        "--sweep-header",
        "X-VTPrune-Method=inflection,topk",
        "--output-len",
        "2",
        "--image-size",
        "168",
    ]
    arguments += ["--no-plots", "--seed", "20261127", "--result-dir", str(tmp_path)]

    def run() -> tuple[dict[str, Any], str]:
        assert main(arguments) == 0
        return json.loads((tmp_path / "result.json").read_text()), capsys.readouterr().out

    document, printed = run()
    labels = [entry["setting"] for entry in document["results"]]
    assert labels == ["off", "aggressive method=inflection", "aggressive method=topk"]
    off, *pruned = document["results"]
    assert off["vision_tokens_kept_share"] == 1
    assert all(entry["vision_tokens_kept_share"] < 1 for entry in pruned)
    assert not document["load_points"][0]["cache_use"]["beyond_what_was_asked"]
    document, again = run()
    use = document["load_points"][0]["cache_use"]
    assert use["beyond_what_was_asked"] and use["tower_cache_hits"] == use["pictures_sent"] == 18
    assert use["prefix_cache_hit_tokens"] > 0
    assert "caches answered more" in " ".join(again.split()) and "caches answered" not in printed
