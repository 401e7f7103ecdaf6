# SPDX-License-Identifier: Apache-2.0
"""docs/clients.md, as far as its clients come with vLLM: the code on the page prunes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.snippets import SNIPPETS, balanced_requests, run

HERE = [title for title, snippet in SNIPPETS.items() if not snippet.packages]


def test_the_page_has_ten_clients() -> None:
    assert len(SNIPPETS) == 10 and {"OpenAI", "Anthropic", "vllm bench serve"} == {*HERE}


@pytest.mark.engine
@pytest.mark.parametrize("title", HERE)
def test_the_page_s_code_prunes(server: str, title: str, tmp_path: Path) -> None:
    before = balanced_requests(server)
    output = run(SNIPPETS[title], server, tmp_path)
    assert balanced_requests(server) > before, output
