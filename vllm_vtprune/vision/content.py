# SPDX-License-Identifier: Apache-2.0
"""What identifies an image in a cache."""

from __future__ import annotations

import numpy as np
from PIL import Image
from vllm.multimodal.media import MediaWithBytes


def content(item: object, index: int) -> object:
    """An image's bytes as received, or its decoded pixels: what `MultiModalHasher` is to hash.

    Args:
        item: as vLLM's parser holds it for hashing.
        index: its number in the prompt.

    Raises:
        ValueError: the image was given by its id alone.
    """
    if item is None:
        raise ValueError(
            f"Image {index} has no content: its URL is empty, or it was given by its id alone. Send the "
            "image itself, or start the server with trust_image_ids where clients may share cached images "
            "by id."
        )
    if isinstance(item, MediaWithBytes):
        return {"bytes": item.original_bytes, "io": item.io_config or {}}
    if isinstance(item, Image.Image):
        palette = item.palette
        return {
            "mode": item.mode,
            "pixels": np.asarray(item),
            "palette": None if palette is None else [palette.mode, bytes(palette.palette)],
        }
    return item
