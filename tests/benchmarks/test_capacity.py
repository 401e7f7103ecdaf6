# SPDX-License-Identifier: Apache-2.0
"""What the capacity benchmark predicts, by hand and by running a queue."""

from __future__ import annotations

import pytest

from benchmarks.capacity import Arm, Seen, arms, counted, table
from vtprune_loadtest.errors import LoadTestError

PAGE, CACHE = 1 << 16, 320 << 20  # bytes of a block in one layer, and of the cache


def test_blocks_are_those_of_each_bands_tokens() -> None:
    """67 text and 576 visual tokens in blocks of 32: 21 blocks whole, 12 with half of the picture."""
    found = [counted(arm, 12, PAGE, CACHE, 67, 576) for arm in arms(12)]
    assert [c.groups for c in found] == [1, 2, 3, 4, 2]
    assert [c.needed for c in found] == [21, 21 + 12, 21 + 12 + 7, 21 + 12 + 7 + 5, 21 + 21]
    assert found[-1].held == 21 + 3 and all(c.held == c.needed for c in found[:-1])
    # a page of one layer is what the cache consists of, whatever the groups
    pages = CACHE // PAGE
    assert [c.running for c in found[:-1]] == [
        (pages // (12 // c.groups) - 1) // c.needed for c in found[:-1]
    ]
    assert [c.running for c in found[:-1]] == sorted(c.running for c in found[:-1])


def test_what_a_gate_returns_lets_others_in_until_no_whole_prompt_fits() -> None:
    found = counted(Arm("", "6:vision=1", gate=True), 12, PAGE, CACHE, 67, 576)
    running, free = 0, found.blocks
    while free >= found.needed:
        running, free = running + 1, free - found.held
    assert found.running == running
    assert found.running > found.blocks // found.needed


def test_the_table_puts_what_was_seen_beside_what_was_predicted() -> None:
    arm = arms(12)[1]
    text = table([(arm, counted(arm, 12, PAGE, CACHE, 67, 576), Seen(643, 25, 33.0, 0))])
    assert "25 / 25" in text and "33 / 33" in text and "6:vision=0.5" in text


def test_bands_that_waste_cache_are_refused() -> None:
    with pytest.raises(LoadTestError, match="leaves part of the cache empty"):
        counted(Arm("", "5:vision=0.5"), 12, PAGE, CACHE, 67, 576)
