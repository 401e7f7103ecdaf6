# SPDX-License-Identifier: Apache-2.0
"""One tiny checkpoint of each family, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.family_checkpoints import CHECKPOINTS
from tests.helpers.family_processor import processor_of

Checkpoint = Callable[[str], Path]


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
