# SPDX-License-Identifier: Apache-2.0
"""Files that share something that takes long to start are handed to one worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.helpers.scheduling import GROUP_OF, LONGEST_FIRST, TOGETHER, longest_first, unit


@pytest.mark.parametrize("fixture", [*TOGETHER, "parallel"])
def test_who_asks_for_it_is_in_its_group(fixture: str, request: pytest.FixtureRequest) -> None:
    """Of all files that this run collected."""
    using = {item.nodeid for item in request.session.items if fixture in getattr(item, "fixturenames", ())}
    assert len({unit(nodeid) for nodeid in using}) <= 1


def test_the_files_are_there() -> None:
    assert [name for name in GROUP_OF if not (REPOSITORY / name).is_file()] == []
    assert [
        name for name in LONGEST_FIRST if name not in TOGETHER and not (REPOSITORY / name).is_file()
    ] == []


def test_long_units_come_first_and_each_keeps_its_order() -> None:
    group, long = TOGETHER["live_server"], LONGEST_FIRST[0]
    nodeids = [f"{group[1]}::a", "tests/test_a.py::a", f"{group[0]}::b[x::y]", f"{long}::a", f"{long}::b"]
    items: list[Any] = [SimpleNamespace(nodeid=nodeid) for nodeid in nodeids]
    longest_first(items)
    assert [item.nodeid for item in items] == [nodeids[i] for i in (3, 4, 0, 2, 1)]
