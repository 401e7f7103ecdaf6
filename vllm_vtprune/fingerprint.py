# SPDX-License-Identifier: Apache-2.0
"""A short text that tells a checkpoint's weights from any other's, without reading them all.

It covers every tensor's name, type and shape, and the bytes at its start, middle and end: training changes
all of a model's tensors, so a fine-tuned copy differs, and the same weights in other files do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from vllm_vtprune.vision.checkpoint import shards

_SAMPLE = 64


def fingerprint(model: str, *, revision: str | None = None, download_dir: str | None = None) -> str:
    """Of a checkpoint in safetensors format, 16 hexadecimal digits.

    Args:
        model: local folder or hub id.
        revision: branch, tag or commit of a hub id.
        download_dir: cache folder of the hub client; None for its default.

    Raises:
        CheckpointError: it has no safetensors files.
    """
    return of_files(shards(model, lambda name: name, revision, download_dir))


@cache
def cached_fingerprint(model: str, revision: str | None, download_dir: str | None) -> str:
    """`fingerprint`, read once."""
    return fingerprint(model, revision=revision, download_dir=download_dir)


def of_files(paths: Iterable[Path]) -> str:
    """Of the tensors in these safetensors files, 16 hexadecimal digits."""
    seen: dict[str, bytes] = {}
    for path in paths:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                low, high = tensor["data_offsets"]
                digest = hashlib.sha256(f"{name} {tensor['dtype']} {tensor['shape']}".encode())
                for place in (low, (low + high - _SAMPLE) // 2, high - _SAMPLE):
                    start = max(low, place)
                    file.seek(8 + size + start)
                    digest.update(file.read(min(_SAMPLE, high - start)))
                seen[name] = digest.digest()
    total = hashlib.sha256(b"".join(seen[name] for name in sorted(seen)))
    return total.hexdigest()[:16]
