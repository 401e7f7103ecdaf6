# SPDX-License-Identifier: Apache-2.0
"""Reads a vision tower's and its projector's weights out of a checkpoint, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from vllm_vtprune.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_EMBEDDINGS = "embed_tokens.weight"
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


def check_vision_weights(
    model: str,
    rename: Callable[[str], str | None],
    prefixes: Mapping[str, str],
    *,
    revision: str | None = None,
    download_dir: str | None = None,
) -> None:
    """Refuse, before an engine starts, a checkpoint that lacks its vision tower or its projector.

    Reads names alone. Where a hub id's names cannot be read without its weights, nothing is said: the check
    follows when they are there.

    Args:
        model: local folder or hub id.
        rename: as in `load_vision_weights`.
        prefixes: of the weights' names -> what `rename` makes of them, one for each part.
        revision: branch, tag or commit of a hub id.
        download_dir: cache folder of the hub client; None for its default.

    Raises:
        CheckpointError: a part is missing, or a local folder holds no safetensors files.
    """
    keys = _keys(model, revision, download_dir)
    if keys is None:
        return
    names = [name for key in keys if (name := rename(key)) is not None]
    refuse_missing_parts(model, names, prefixes)


def refuse_missing_parts(model: str, names: Iterable[str], prefixes: Mapping[str, str]) -> None:
    """Refuse new names among which one of the parts is missing.

    Raises:
        CheckpointError: one is.
    """
    found = list(names)
    for prefix, new in prefixes.items():
        if not any(name.startswith(new) for name in found):
            raise CheckpointError(
                f"{model} holds no {prefix}* weights: vtprune needs a checkpoint in safetensors format with "
                "its vision tower and projector."
            )


def _keys(model: str, revision: str | None, download_dir: str | None) -> list[str] | None:
    """The names of all weights; None where a hub id does not tell without them."""
    if Path(model).is_dir():
        names: list[str] = []
        for path in shards(model, lambda key: key, revision, download_dir):
            with safe_open(path, framework="pt") as shard:
                names += shard.keys()
        return names
    from huggingface_hub import hf_hub_download

    try:
        index = hf_hub_download(model, _INDEX, revision=revision, cache_dir=download_dir)
    except (OSError, ValueError):  # no index, no network, no such model: vLLM says it better
        return None
    return list(json.loads(Path(index).read_text())["weight_map"])


class EmbeddingRows:
    """Rows of the language model's input embeddings, read from the checkpoint one by one. Thread-safe.

    A prompt's question has some tens of tokens, and the table as many rows as the vocabulary: it stays on the
    disk, where the operating system's cache holds what is asked for.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path = path
        self._key = key

    @staticmethod
    def of(model: str, *, revision: str | None = None, download_dir: str | None = None) -> EmbeddingRows:
        """Find the table.

        Args:
            model: local folder or hub id.
            revision: branch, tag or commit of a hub id.
            download_dir: cache folder of the hub client; None for its default.

        Raises:
            CheckpointError: there is none, or it is quantised.
        """

        def rename(key: str) -> str | None:
            return key if key.endswith(_EMBEDDINGS) else None

        for path in shards(model, rename, revision, download_dir):
            with safe_open(path, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118
                    if rename(key) is not None and _whole(shard.get_slice(key)[0:1]):
                        return EmbeddingRows(path, key)
        raise CheckpointError(f"{model} holds no input embeddings in 16 or 32 bits.")

    def read(self, ids: Sequence[int]) -> Tensor:
        """[M, E] float32: the rows of these M tokens; ids beyond the table are passed over."""
        with safe_open(self._path, framework="pt") as shard:
            table = shard.get_slice(self._key)
            size, width = table.get_shape()
            rows = [table[i : i + 1] for i in ids if 0 <= i < size]
        return torch.cat(rows).float() if rows else torch.empty((0, width))


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
