# SPDX-License-Identifier: Apache-2.0
"""The single server's own tests, run against something else that claims its contract."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import REPOSITORY

#: For tests that are too long for every run: they belong to the environment that has Ray.
only_in_test_deploy = pytest.mark.skipif(find_spec("ray") is None, reason="make test-deploy runs this")

#: Tests that ask one server over HTTP and nothing else of it.
CONTRACT = (
    "tests/server/test_contract.py",
    "tests/server/test_openai_client.py",
    "tests/server/test_inspection.py",
)


def run_contract_tests(url: str, *arguments: str) -> None:
    """Run them in a process of their own, against a server that runs."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CONTRACT, *arguments]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**ours, "VTPRUNE_TEST_URL": url},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
