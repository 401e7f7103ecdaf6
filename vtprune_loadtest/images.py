# SPDX-License-Identifier: Apache-2.0
"""Pictures to send: files of a folder as they are, or drawn from a seed, all distinct.

Distinct on purpose: a server keeps towers' outputs, processed pictures and prefixes in caches, and a picture
sent twice measures those instead of the work.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageDraw

from vtprune_loadtest.errors import LoadTestError

MIME_TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
}
_JPEG_QUALITY = 90
_TEXTURE_CELLS = 8  # the background is this many random colours each way, smoothed to the full size


@dataclass(frozen=True, slots=True)
class Picture:
    """One encoded picture file."""

    mime_type: str
    data: bytes


class PicturesUsedUp(LoadTestError):
    """More distinct pictures were asked for than there are."""


class PictureSource(Protocol):
    """Distinct pictures by number."""

    def picture(self, index: int) -> Picture:
        """Picture number `index` (0, 1, ...); the same number is the same bytes.

        Raises:
            PicturesUsedUp: there is no picture of that number.
        """


class DrawnPictures:
    """Endless drawn pictures: a smooth random texture under one to six filled shapes."""

    def __init__(self, width: int, height: int, encoding: Literal["jpeg", "png"], seed: int) -> None:
        """Draw `width` by `height` pixels."""
        self._size = (width, height)
        self._encoding = encoding
        self._seed = seed

    def picture(self, index: int) -> Picture:
        """Draw picture number `index`, the same for the same seed, size and number."""
        rng = np.random.default_rng([self._seed, index])
        cells = rng.integers(0, 256, (_TEXTURE_CELLS, _TEXTURE_CELLS, 3), dtype=np.uint8)
        image = Image.fromarray(cells).resize(self._size, Image.Resampling.BICUBIC)
        draw = ImageDraw.Draw(image)
        for _ in range(rng.integers(1, 7)):
            left, top = (float(side * rng.uniform(-0.1, 0.8)) for side in self._size)
            right, bottom = (
                float(start + side * rng.uniform(0.1, 0.4))
                for start, side in zip((left, top), self._size, strict=True)
            )
            red, green, blue = rng.integers(0, 256, 3).tolist()
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape((left, top, right, bottom), fill=(red, green, blue))
        buffer = io.BytesIO()
        image.save(buffer, format=self._encoding, quality=_JPEG_QUALITY)
        return Picture(f"image/{self._encoding}", buffer.getvalue())


def smaller(picture: Picture, pixels: float) -> Picture:
    """The picture at its own shape with `pixels` times as many pixels, encoded as it was.

    What pruning is compared with (arXiv 2510.07143): a tower that takes pictures of any size gives about
    `pixels` times the tokens.
    """
    with Image.open(io.BytesIO(picture.data)) as image:
        size = tuple(max(1, round(side * pixels**0.5)) for side in image.size)
        shrunk = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC)
        encoding = image.format or "png"
    buffer = io.BytesIO()
    shrunk.save(buffer, format=encoding, quality=_JPEG_QUALITY)
    return Picture(picture.mime_type, buffer.getvalue())


class FolderPictures:
    """The distinct picture files of a folder, in an order shuffled by the seed, sent byte for byte."""

    def __init__(self, folder: Path, seed: int) -> None:
        """List the folder.

        Raises:
            LoadTestError: it is no folder, or holds no picture of a known type.
        """
        if not folder.is_dir():
            raise LoadTestError(f"--images names {str(folder)!r}, which is not a folder.")
        by_content: dict[bytes, Path] = {}
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in MIME_TYPES and path.is_file():
                by_content.setdefault(hashlib.sha256(path.read_bytes()).digest(), path)
        if not by_content:
            raise LoadTestError(
                f"--images {folder}: no picture there; known endings are {', '.join(MIME_TYPES)}."
            )
        self._folder = folder
        paths = list(by_content.values())
        self._paths = [paths[i] for i in np.random.default_rng(seed).permutation(len(paths))]

    def picture(self, index: int) -> Picture:
        """Read the file that is number `index` in the shuffled order."""
        if index >= len(self._paths):
            raise PicturesUsedUp(
                f"The {len(self._paths)} distinct pictures of {self._folder} are used up: add pictures, "
                "ask for fewer requests (--num-prompts, --duration, --warmup), or allow repeats "
                "(--repeat-share)."
            )
        path = self._paths[index]
        return Picture(MIME_TYPES[path.suffix.lower()], path.read_bytes())
