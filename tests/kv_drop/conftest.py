# SPDX-License-Identifier: Apache-2.0
"""The engine runs that stage 2's tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import tell_at_the_end
from tests.helpers.kv_matrix import ON, Runs, Verdicts, checkpoints


@pytest.fixture(scope="session")
def kv_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return checkpoints(tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def runs(
    kv_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("runs"), kv_checkpoints)
    # where all are asked for, they run while answers are compared; a single test starts its own only, as does
    # a worker of several, which is given one file's tests
    if (
        "PYTEST_XDIST_WORKER" not in os.environ
        and sum(item.path.name == "test_equality.py" for item in request.session.items) > 30
    ):
        for scenario, runners in ON.items():
            for runner in runners:
                runs.start(scenario, runner)
    yield runs
    runs.close()


@pytest.fixture(scope="session")
def verdicts(kv_checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Verdicts]:
    """Prints at the end how many answers equalled the reference's, by scenario and runner."""
    verdicts = Verdicts(kv_checkpoints)
    yield verdicts
    tell_at_the_end(request.config, ["", *verdicts.table()])
