# SPDX-License-Identifier: Apache-2.0
"""Which part of a picture CLIP's preprocessing looks at.

CLIP image processors resize the shorter side and cut a square out of the middle
(`transformers.models.clip.CLIPImageProcessor`); some LLaVA processors pad to a square first (`do_pad`).
"""

from __future__ import annotations

from typing import Any

from PIL import Image

#: Longer than this (long side over short side), a picture is cut to its middle before it is resized.
MAX_ASPECT = 32
#: Source pixels left of and right of the square that the resize filter may still reach, in short sides.
_MARGIN = 4


def crop_of(size: tuple[int, int], image_processor: Any) -> dict[str, float]:
    """The part of a picture that the patch grid covers.

    Args:
        size: the picture's width and height in pixels.
        image_processor: the checkpoint's Hugging Face image processor.

    Returns:
        left, top, width and height as fractions of the picture's width and height. A processor that pads
        reaches beyond the picture: then left or top is negative.
    """
    width, height = size
    padded_width, padded_height = _padded(size, image_processor)
    covered_width, covered_height = float(padded_width), float(padded_height)
    if getattr(image_processor, "do_center_crop", False):
        resized_width, resized_height = _resized((padded_width, padded_height), image_processor)
        crop = image_processor.crop_size
        covered_width *= crop["width"] / resized_width
        covered_height *= crop["height"] / resized_height
    return {
        "left": (width - covered_width) / 2 / width,
        "top": (height - covered_height) / 2 / height,
        "width": covered_width / width,
        "height": covered_height / height,
    }


def bounded(image: Image.Image, image_processor: Any) -> Image.Image:
    """The picture, cut to its middle where it is so long that resizing it would take gigabytes.

    A picture of 1 x 10,000 pixels becomes 336 x 3,360,000 when the shorter side is resized, of which only the
    middle 336 are looked at. Pictures up to `MAX_ASPECT` are returned as they are; of longer ones the part
    that the centre crop and the resize filter reach is kept, so what the tower sees stays the same up to
    rounding.

    Raises:
        ValueError: the processor pads to a square, and that square would be too large.
    """
    short, long = sorted(image.size)
    if long <= MAX_ASPECT * short:
        return image
    if getattr(image_processor, "do_pad", False):
        raise ValueError(
            f"The image is {image.size[0]}x{image.size[1]} pixels: this model takes none that is more than "
            f"{MAX_ASPECT} times as long as wide; crop it first."
        )
    if not getattr(image_processor, "do_center_crop", False):
        return image
    # an even number of pixels goes from the two ends together, so the middle stays the middle
    cut = (long - (2 * _MARGIN + 1) * short) // 2
    left, top = (cut, 0) if image.size[0] == long else (0, cut)
    return image.crop((left, top, image.size[0] - left, image.size[1] - top))


def _padded(size: tuple[int, int], image_processor: Any) -> tuple[int, int]:
    return (max(size), max(size)) if getattr(image_processor, "do_pad", False) else size


def _resized(size: tuple[int, int], image_processor: Any) -> tuple[int, int]:
    """Width and height after the resize step."""
    target = image_processor.size
    if not getattr(image_processor, "do_resize", False):
        return size
    edge = target.get("shortest_edge")
    if edge is None:
        return int(target["width"]), int(target["height"])
    width, height = size
    short, long = sorted(size)
    # int() as transformers.image_transforms.get_resize_output_image_size does
    scaled = int(edge * long / short)
    return (edge, scaled) if width <= height else (scaled, edge)
