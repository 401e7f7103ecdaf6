# SPDX-License-Identifier: Apache-2.0
"""`vtprune serve` with something that cannot work: one sentence, exit status 2, no traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DEMO_MODEL
from tests.helpers.checkpoints import edit_config, random_llava
from tests.helpers.warm_process import WarmProcess

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmProcess]:
    """Has imported vLLM, for what is refused after that."""
    process = WarmProcess({**os.environ, "VLLM_LOGGING_LEVEL": "INFO"})
    yield process
    process.close()


def serve(folder: Path, *arguments: str, warm: WarmProcess | None = None, **env: str) -> str:
    """The sentence on standard error."""
    log = serve_log(folder, *arguments, warm=warm, **env)
    lines = [line for line in log.splitlines() if line.startswith("vtprune: ")]
    assert len(lines) == 1, log
    return lines[0]


def serve_log(folder: Path, *arguments: str, warm: WarmProcess | None = None, **env: str) -> str:
    """All that it prints."""
    environment, log = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", **env}, folder / "log"
    arguments = ("serve", *arguments)
    if warm is not None:
        how: dict[str, Any] = {"env": environment, "log": log, "timeout": 600, "cwd": folder}
        status = warm.run("vtprune_server.cli", arguments, **how)
    else:
        with log.open("wb") as output:
            command = [sys.executable, "-m", "vtprune_server.cli", *arguments]
            options: dict[str, Any] = {"env": environment, "cwd": folder, "timeout": 600}
            status = subprocess.run(command, stdout=output, stderr=output, **options).returncode
    told = log.read_text(errors="replace")
    assert status == 2, told
    assert "Traceback" not in told
    return told


def test_a_tower_that_cannot_be_pruned_where_the_operator_asks_for_it(
    tmp_path: Path, warm: WarmProcess
) -> None:
    """Else the checkpoint is served as by vLLM alone."""
    folder = random_llava(tmp_path / "pixtral", image_size=56, layers=1, hidden=64, heads=2, kv_heads=2)
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    edit_config(folder, {"vision_config": {**vision, "model_type": "pixtral"}})
    arguments = (str(folder), "--enforce-eager", "--vtprune-default-preset", "balanced")
    sentence = serve(tmp_path, *arguments, warm=warm)
    assert "CLIP or SigLIP vision tower" in sentence and "pixtral" in sentence


def test_the_rust_front_end(tmp_path: Path) -> None:
    assert "VLLM_USE_RUST_FRONTEND" in serve(tmp_path, VLLM_USE_RUST_FRONTEND="1")


def test_a_machine_without_the_library_that_vllms_cpu_kernels_are_linked_to(tmp_path: Path) -> None:
    """As in slim Debian images; a file that is no library stands in for the missing one."""
    (tmp_path / "libnuma.so.1").write_bytes(b"")
    assert "libnuma1" in serve(tmp_path, LD_LIBRARY_PATH=str(tmp_path))


def test_a_policy_that_cannot_work(tmp_path: Path, warm: WarmProcess) -> None:
    sentence = serve(tmp_path, "--vtprune-max-aggressiveness", "2", warm=warm)
    assert "--vtprune-max-aggressiveness" in sentence
    assert "number" in serve(tmp_path, "--prune-layer", "three", warm=warm)


def test_a_model_that_is_not_there(tmp_path: Path, warm: WarmProcess) -> None:
    folder = str(tmp_path / "nowhere")
    assert f"no folder {folder}" in serve(tmp_path, folder, warm=warm)


def test_a_port_that_is_taken(tmp_path: Path, warm: WarmProcess) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        sentence = serve(tmp_path, "--host", "127.0.0.1", "--port", port, warm=warm)
    assert port in sentence and "--port" in sentence


def test_a_checkpoint_without_a_tower(tmp_path: Path, warm: WarmProcess) -> None:
    from safetensors.torch import load_file, save_file

    for path in DEMO_MODEL.iterdir():
        if path.is_file():  # once imported it has a folder of bytecode
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    text_only = {name: t for name, t in load_file(weights).items() if "vision_tower" not in name}
    save_file(text_only, weights, metadata={"format": "pt"})
    log = serve_log(tmp_path, str(tmp_path), "--enforce-eager", warm=warm)
    assert "holds no vision_tower" in log.splitlines()[-1]
    assert "EngineCore" not in log, "no engine was started for it"
