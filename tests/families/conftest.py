# SPDX-License-Identifier: Apache-2.0
"""One tiny checkpoint of each family, made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.family_checkpoints import CHECKPOINTS
from tests.helpers.family_processor import processor_of

Checkpoint = Callable[[str], Path]


def chosen(in_ci: Sequence[str]) -> list[str]:
    """Families for tests that start an engine each; VTPRUNE_TEST_FAMILIES: names by commas, or all."""
    asked = os.environ.get("VTPRUNE_TEST_FAMILIES")
    if asked is None:
        return list(in_ci)
    return list(CHECKPOINTS) if asked == "all" else asked.split(",")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A family's checkpoint by its name in `CHECKPOINTS`."""

    @cache
    def made(name: str) -> Path:
        return CHECKPOINTS[name](tmp_path_factory.mktemp(name) / name)

    return made


@pytest.fixture(scope="session")
def processor(checkpoint: Checkpoint) -> Callable[[str], Any]:
    """The processor that vLLM builds for a family's checkpoint, with the plugin loaded."""
    return cache(lambda name: processor_of(checkpoint(name)))
