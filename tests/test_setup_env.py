# SPDX-License-Identifier: Apache-2.0
"""The set-up script, where it must not touch what is not its own."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def test_a_linked_environment_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    """`.venv` is a link to another checkout's: that one must not have to set up again."""
    checkout, other = tmp_path / "checkout", tmp_path / "other"
    inputs = runpy.run_path(str(REPOSITORY / "tools" / "setup_env.py"))["INPUTS"]
    for file in [*inputs, REPOSITORY / "tools" / "setup_env.py"]:
        copy = checkout / Path(file).relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    other.mkdir()
    (other / "vtprune-setup.stamp").write_text("up to date")
    (checkout / ".venv").symlink_to(other)
    done = subprocess.run(
        [sys.executable, checkout / "tools" / "setup_env.py"], capture_output=True, text=True
    )
    assert done.returncode != 0 and "is not a folder; move it away" in done.stderr
    assert (other / "vtprune-setup.stamp").read_text() == "up to date"
