# SPDX-License-Identifier: Apache-2.0
"""Images and videos as vLLM's parser holds them: decoded, and what identifies them in a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, VideoProcessorItems

_DECODED: Mapping[str, type[Any]] = {"image": ImageProcessorItems, "video": VideoProcessorItems}


def decoded(items: MultiModalDataItems, modality: str) -> list[Any]:
    """The decoded images, or videos; empty where there are none, and for embeddings given by the caller."""
    found = items.get(modality)
    return list(found.get_all()) if isinstance(found, _DECODED[modality]) else []


def check_frames(video: Any, index: int, fewest: int) -> None:
    """Refuse a video too short for its model.

    Args:
        video: frames, alone or with what the decoder tells of them; None where a trusted id stands for it.
        index: its number in the prompt.
        fewest: frames that it must have.

    Raises:
        VLLMValidationError: it has fewer.
    """
    if video is None:
        return
    frames = len(video[0] if isinstance(video, tuple) else video)
    if frames == 0:
        raise VLLMValidationError(f"Video {index} has no frames: send a whole one.", parameter="video_url")
    if frames < fewest:
        raise VLLMValidationError(
            f"Video {index} has {frames} frame{'s' * (frames > 1)}, and this model's videos have {fewest} at "
            "least: send it as an image, or have more frames sampled.",
            parameter="video_url",
        )


def content(item: object, index: int, modality: str = "image") -> object:
    """What `MultiModalHasher` is to hash of an image or a video: its bytes as received, or its pixels.

    Args:
        item: as vLLM's parser holds it for hashing.
        index: its number in the prompt.
        modality: `image` or `video`.

    Raises:
        ValueError: the item was given by its id alone.
    """
    if item is None:
        name = modality.capitalize()
        raise ValueError(
            f"{name} {index} has no content: its URL is empty, or it was given by its id alone. Send the "
            f"{modality} itself, or start the server with trust_image_ids where clients may share cached "
            f"{modality}s by id."
        )
    if isinstance(item, tuple):
        # a video, and which frames of it were sampled
        frames, told = item
        return {"frames": content(frames, index, modality), "told": told}
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
