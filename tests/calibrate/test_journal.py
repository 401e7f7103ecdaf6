# SPDX-License-Identifier: Apache-2.0
"""The journal keeps what is done, over interruptions, and for one calibration only."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtprune_calibrate.journal import Journal, JournalError
from vtprune_eval.backend import Reply

RUN = {"model": {"weights": "abc"}, "window": 8}
REPLIES = [
    Reply("red", 144, 144, 153, 80, (40,)),
    Reply("", 144, 144, 153, 80, (40,)),
    Reply("é", 1, 1, 9, 9),
]


def test_what_was_noted_is_found_by_the_next_run(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal", RUN)
    assert first.get("a") is None
    first.put("a", REPLIES)
    first.put("b", REPLIES[:1])
    again = Journal(tmp_path / "journal", RUN)
    assert (again.get("a"), again.get("b"), again.get("c"), len(again)) == (REPLIES, REPLIES[:1], None, 2)


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_that_was_being_written_is_done_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, RUN)
    journal.put("a", REPLIES)
    journal.put("b", REPLIES)
    path.write_text(path.read_text()[:-cut])
    again = Journal(path, RUN)
    assert (again.get("a"), again.get("b")) == (REPLIES, None)
    again.put("b", REPLIES)
    assert Journal(path, RUN).get("b") == REPLIES


def test_another_calibration_is_refused_by_what_differs(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", RUN)
    with pytest.raises(JournalError, match=r"another model, window: move it away .* --out"):
        Journal(tmp_path / "journal", {"model": {"weights": "abd"}, "window": 4})
    (tmp_path / "journal").write_text("no JSON\n")
    with pytest.raises(JournalError, match="is no journal"):
        Journal(tmp_path / "journal", RUN)
