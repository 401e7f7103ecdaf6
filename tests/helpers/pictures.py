# SPDX-License-Identifier: Apache-2.0
"""Pictures the tests send."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageDraw


def scene(offset: int = 0, size: int = 168) -> Image.Image:
    """A red circle and a blue square on grey; `offset` moves the circle, so each gives another picture."""
    image = Image.new("RGB", (size, size), (120, 130, 125))
    draw = ImageDraw.Draw(image)
    unit = size / 168
    # in the middle of two cells of a 3x3 grid, as the demo model knows shapes
    draw.ellipse([(10 + offset) * unit, 10 * unit, (46 + offset) * unit, 46 * unit], fill=(220, 40, 40))
    draw.rectangle([122 * unit, 122 * unit, 158 * unit, 158 * unit], fill=(50, 80, 220))
    return image


def noise(seed: int, size: int = 168) -> Image.Image:
    """Random pixels."""
    pixels = np.random.RandomState(seed).randint(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def data_url(image: Image.Image | bytes, kind: str = "PNG", mime: str | None = None) -> str:
    """The picture as a data URL."""
    content = image if isinstance(image, bytes) else encoded(image, kind)
    return f"data:{mime or 'image/' + kind.lower()};base64," + base64.b64encode(content).decode()
