# SPDX-License-Identifier: Apache-2.0
"""The images' entry point: secrets come out of files, and no server starts without the key it was to have."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    """The entry point with a `vtprune` that prints what it was given."""
    command = tmp_path / "bin" / "vtprune"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\necho "$VLLM_API_KEY|$OPENAI_API_KEY|$*"; env | grep -c _FILE= || true\n')
    command.chmod(0o755)

    def start(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": f"{command.parent}:{os.environ['PATH']}", **env}
        return subprocess.run(
            [DEPLOY / "image" / "entrypoint.sh", *arguments], env=environment, capture_output=True, text=True
        )

    return start


def test_secrets_come_out_of_files(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "key").write_text("a $secret `key`\n")
    done = run("serve", "a model", VLLM_API_KEY_FILE=str(tmp_path / "key"))
    assert done.stdout.splitlines() == ["a $secret `key`||serve a model", "0"]


def test_without_a_file_the_environment_stands(run) -> None:  # type: ignore[no-untyped-def]
    assert run("serve", VLLM_API_KEY="given").stdout.splitlines()[0] == "given||serve"


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_a_key_that_is_not_there_stops_the_server(run, tmp_path: Path, content: str | None) -> None:  # type: ignore[no-untyped-def]
    if content is not None:
        (tmp_path / "key").write_text(content)
    done = run("serve", VLLM_API_KEY_FILE=str(tmp_path / "key"))
    assert done.returncode == 2 and not done.stdout
    assert "VLLM_API_KEY_FILE names" in done.stderr
