# SPDX-License-Identifier: Apache-2.0
"""What several tests share: a fake chat server, a tiny model of the benchmarks, and quiet logs."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_chat import FakeChat, serve_fake_chat
from vllm_vtprune.error_text import withhold_everywhere
from vtprune_bench import models

DECODER = models.Decoder(hidden=64, intermediate=96, layers=3, heads=2, vocab=300)
TOWER = models.Tower(hidden=32, intermediate=64, layers=3, heads=2, image=56)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeChat]:
    with serve_fake_chat() as fake:
        yield fake


@pytest.fixture
def fake(running: FakeChat) -> FakeChat:
    running.reset()
    return running


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA of `DECODER` and `TOWER`."""
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    models.random_llava(folder, DECODER, TOWER)
    return folder


@pytest.fixture
def withheld() -> Iterator[None]:
    """Records are made without the text of errors, as in a process that serves requests."""
    factory = logging.getLogRecordFactory()
    withhold_everywhere()
    yield
    logging.setLogRecordFactory(factory)
