# SPDX-License-Identifier: Apache-2.0
"""Reads a vision tower's and its projector's weights out of a checkpoint, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_vtprune.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
#: What quantised checkpoints store beside or instead of a weight.
_QUANTISED = ("_scale", "_scale_inv", "qweight", "qzeros", ".SCB", "_packed")


def load_vision_weights(
    model: str,
    rename: Callable[[str], str | None],
    *,
    revision: str | None = None,
    download_dir: str | None = None,
) -> dict[str, Tensor]:
    """Load the weights that `rename` names.

    Only the shards that hold them are opened, and fetched where `model` is a hub id.

    Args:
        model: local folder or hub id.
        rename: a weight's new name; None for one that is not wanted.
        revision: branch, tag or commit of a hub id.
        download_dir: cache folder of the hub client; None for its default.

    Returns:
        New name -> tensor.

    Raises:
        CheckpointError: no safetensors files, or the weights are quantised.
    """
    weights: dict[str, Tensor] = {}
    for path in shards(model, rename, revision, download_dir):
        with safe_open(path, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118  (safe_open is not iterable)
                name = rename(key)
                if name is None:
                    continue
                tensor = shard.get_tensor(key)
                if key.endswith(_QUANTISED) or not _whole(tensor):
                    raise CheckpointError(
                        f"{key} of {model} is quantised ({str(tensor.dtype).removeprefix('torch.')}): "
                        "vtprune runs the vision tower itself and needs its weights in 16 or 32 bits; use a "
                        "checkpoint that quantises the language model only, or set VLLM_PLUGINS='' to run "
                        "without vtprune."
                    )
                weights[name] = tensor
    return weights


def _whole(tensor: Tensor) -> bool:
    # position ids of old files are integers
    return tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)


def shards(
    model: str, rename: Callable[[str], str | None], revision: str | None, download_dir: str | None
) -> list[Path]:
    """The safetensors files that hold the weights that `rename` names, fetched where `model` is a hub id.

    Raises:
        CheckpointError: there are none.
    """
    folder = Path(model)
    if not folder.is_dir():
        return _hub_shards(model, rename, revision, download_dir)
    index = folder / _INDEX
    if index.is_file():
        paths = [folder / name for name in _needed(index, rename)]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [str(path.name) for path in paths if not path.is_file()]
    if not paths or missing:
        raise CheckpointError(
            f"{model} lacks {', '.join(missing) or 'safetensors files'}: give a complete checkpoint in "
            "safetensors format."
        )
    return paths


def _hub_shards(
    model: str, rename: Callable[[str], str | None], revision: str | None, download_dir: str | None
) -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(model, name, revision=revision, cache_dir=download_dir))

    try:
        names: Iterable[str] = _needed(fetch(_INDEX), rename)
    except EntryNotFoundError:
        names = [_SINGLE]
    try:
        return [fetch(name) for name in names]
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{model} has no {_SINGLE}: convert the checkpoint to safetensors format."
        ) from error


def _needed(index: Path, rename: Callable[[str], str | None]) -> list[str]:
    """Names of the shards that hold wanted weights."""
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return sorted({shard for key, shard in weight_map.items() if rename(key) is not None})
