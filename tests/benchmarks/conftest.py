# SPDX-License-Identifier: Apache-2.0
"""A tiny model of the benchmarks."""

from pathlib import Path

import pytest

from benchmarks.llava import DecoderShape, TowerShape, random_llava

DECODER = DecoderShape(hidden=64, intermediate=96, layers=3, heads=2, vocab=300)
TOWER = TowerShape(hidden=32, intermediate=64, layers=3, heads=2, image=56)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of `DECODER` and `TOWER`."""
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    random_llava(folder, DECODER, TOWER)
    return folder
