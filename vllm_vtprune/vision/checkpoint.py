# SPDX-License-Identifier: Apache-2.0
"""Reads the vision tower's and the projector's weights out of a LLaVA checkpoint, and nothing else.

Two naming schemes are in circulation: `vision_tower.vision_model.*` (public LLaVA checkpoints) and
`vision_tower.*` (what transformers 5 saves), each with or without a leading `model.`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from vllm_vtprune.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOWER = "vision_tower."
_PROJECTOR = "multi_modal_projector."


def load_vision_weights(
    model: str, revision: str | None = None, download_dir: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load tower and projector weights.

    Only the shards that hold them are opened, and fetched where `model` is a hub id.

    Args:
        model: local folder or hub id.
        revision: branch, tag or commit of a hub id.
        download_dir: cache folder of the hub client; None for its default.

    Returns:
        (tower, projector): name -> tensor, with the prefixes removed, as transformers' `CLIPVisionModel`
        and `LlavaMultiModalProjector` name them.

    Raises:
        CheckpointError: no safetensors files, or no tower or projector in them.
    """
    tower: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    for path in _shards(model, revision, download_dir):
        with safe_open(path, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118  (safe_open is not iterable)
                name = key.removeprefix("model.")
                if name.startswith(_TOWER):
                    tower[name.removeprefix(_TOWER).removeprefix("vision_model.")] = shard.get_tensor(key)
                elif name.startswith(_PROJECTOR):
                    projector[name.removeprefix(_PROJECTOR)] = shard.get_tensor(key)
    for found, prefix in ((tower, _TOWER), (projector, _PROJECTOR)):
        if not found:
            raise CheckpointError(
                f"{model} holds no {prefix}* weights: vtprune needs a LLaVA checkpoint in safetensors format "
                "with its vision tower and projector."
            )
    return tower, projector


def _shards(model: str, revision: str | None, download_dir: str | None) -> list[Path]:
    folder = Path(model)
    if not folder.is_dir():
        return _hub_shards(model, revision, download_dir)
    index = folder / _INDEX
    if index.is_file():
        paths = [folder / name for name in _needed(index)]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [str(path.name) for path in paths if not path.is_file()]
    if not paths or missing:
        raise CheckpointError(
            f"{model} lacks {', '.join(missing) or 'safetensors files'}: give a complete LLaVA checkpoint "
            "in safetensors format."
        )
    return paths


def _hub_shards(model: str, revision: str | None, download_dir: str | None) -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(model, name, revision=revision, cache_dir=download_dir))

    try:
        names: Iterable[str] = _needed(fetch(_INDEX))
    except EntryNotFoundError:
        names = [_SINGLE]
    try:
        return [fetch(name) for name in names]
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"{model} has no {_SINGLE}: convert the checkpoint to safetensors format."
        ) from error


def _needed(index: Path) -> list[str]:
    """Names of the shards that hold tower or projector weights."""
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    wanted = (_TOWER, _PROJECTOR)
    return sorted(
        {shard for key, shard in weight_map.items() if key.removeprefix("model.").startswith(wanted)}
    )
