# SPDX-License-Identifier: Apache-2.0
"""docs/models.md says of every architecture what the registry does."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from tests.conftest import REPOSITORY
from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.families.registry import ARCHITECTURES, REFUSED, family_of

PAGE = (REPOSITORY / "docs" / "models.md").read_text()


def rows(columns: int) -> list[list[str]]:
    """Cells of the table with so many columns, architectures without their quotes."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
    return [[cells[0].strip("`"), *cells[1:]] for cells in lines if len(cells) == columns]


def test_the_table_has_every_architecture_that_is_pruned_and_no_other() -> None:
    assert [row[0] for row in rows(7)] == list(ARCHITECTURES)


def test_the_table_says_whose_videos_are_pruned() -> None:
    for row in rows(7):
        assert (row[6] == "yes") is ("video" in ARCHITECTURES[row[0]].load_family().modalities), row[0]


def test_what_is_refused_stands_there_with_its_reason() -> None:
    assert dict(rows(2)) == REFUSED
    assert not set(REFUSED) & set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_entry_names_an_adapter_and_a_class(name: str) -> None:
    entry = ARCHITECTURES[name]
    assert entry.load_family().__doc__
    module, cls = entry.model.split(":")
    source = (REPOSITORY / "vllm_vtprune" / "models" / f"{module}.py").read_text()
    assert re.search(rf"@pruned\nclass {cls}\(PrunedModel, \w+\):", source)


@pytest.mark.parametrize("name", [*REFUSED, "MadeUpForConditionalGeneration"])
def test_what_is_not_pruned_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"prunes no {name}") as caught:
        family_of(SimpleNamespace(architectures=[name]))
    assert REFUSED.get(name, "it prunes") in str(caught.value)
