# SPDX-License-Identifier: Apache-2.0
"""A fake chat server that behaves as told."""

from collections.abc import Iterator

import pytest

from tests.helpers.fake_chat import FakeChat, serve_fake_chat


@pytest.fixture(scope="module")
def running() -> Iterator[FakeChat]:
    with serve_fake_chat() as fake:
        yield fake


@pytest.fixture
def fake(running: FakeChat) -> FakeChat:
    running.reset()
    return running
