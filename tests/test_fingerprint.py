# SPDX-License-Identifier: Apache-2.0
"""A fingerprint is the weights', not their files'."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.fingerprint import fingerprint

WEIGHTS = {
    "b": torch.arange(300, dtype=torch.float32),
    "a": torch.ones(2, 3),
    "empty": torch.zeros(0),
    "one": torch.zeros(1, dtype=torch.int8),
}


def saved(folder: Path, weights: dict[str, torch.Tensor], files: int = 1) -> str:
    folder.mkdir()
    names = list(weights)
    for number in range(files):
        part = {name: weights[name] for name in names[number::files]}
        save_file(part, folder / f"model-{number}.safetensors", metadata={"format": "pt"} if number else None)
    return fingerprint(str(folder))


def test_the_same_weights_in_other_files_are_the_same(tmp_path: Path) -> None:
    assert saved(tmp_path / "one", WEIGHTS) == saved(tmp_path / "two", WEIGHTS, files=2)


@pytest.mark.parametrize(
    "change",
    [
        {"b": torch.arange(300, dtype=torch.float32) + 1},
        {"b": torch.arange(300, dtype=torch.float32).half()},
        {"a": torch.ones(3, 2)},
        {"c": torch.ones(1)},
        {"one": torch.ones(1, dtype=torch.int8)},
    ],
    ids=["values", "type", "shape", "one more", "one byte"],
)
def test_other_weights_are_others(change: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert saved(tmp_path / "one", WEIGHTS) != saved(tmp_path / "two", {**WEIGHTS, **change})


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        fingerprint(str(tmp_path))
