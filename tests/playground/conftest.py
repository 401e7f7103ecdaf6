# SPDX-License-Identifier: Apache-2.0
"""The browser and the servers the playground's tests run against."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.playground.stand_in import StandIn

if TYPE_CHECKING:
    from tests.playground.browser import Page


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser; a test opens the page of the server it is about."""
    pytest.importorskip("selenium", reason="selenium is not installed (it is in the extra `test`)")
    from tests.playground.browser import Page, missing

    if reason := missing():
        pytest.skip(reason)
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.quit()


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """A server without an engine, for what the live one cannot be made to do on request."""
    server = StandIn()
    with server.running():
        yield server
