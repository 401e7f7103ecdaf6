# SPDX-License-Identifier: Apache-2.0
"""Drawn scenes: a textured background, clutter, one to six shapes and often a printed word or digit.

A scene is a pure function of its split, its index and the image size. The splits use disjoint ranges of
seeds, and the colour-shape pairs in `HELD_OUT_PAIRS` are drawn in the test split only.
`vtprune_eval.scene_questions` asks about scenes.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

PATCH = 14
"""Side of one vision patch in pixels."""
BASE_SIZE = 168
"""Image size that all lengths in this file are written for; other sizes scale them."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 40),
    "purple": (150, 50, 180),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
RADII = ((11, 13), (16, 18), (21, 23))
"""Radius range in pixels of a small, a medium and a large shape."""
PLACES = (
    ("top-left", "top", "top-right"),
    ("left", "center", "right"),
    ("bottom-left", "bottom", "bottom-right"),
)
WORDS = (
    "cat",
    "dog",
    "sun",
    "bus",
    "key",
    "map",
    "owl",
    "fox",
    "jam",
    "hut",
    "zip",
    "web",
    "ink",
    "elk",
    "pie",
    "van",
)
DIGITS = tuple("0123456789")
PRINTED = WORDS + DIGITS
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("blue", "cross"),
        ("green", "triangle"),
        ("yellow", "circle"),
        ("purple", "square"),
        ("orange", "diamond"),
    }
)
ALL_PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
SEEN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)

SPLITS = {"train": 0, "validation": 1, "test": 2}
SCENES_PER_SPLIT = 1 << 40
TEXT_SHARE = 0.8
"""Share of scenes that carry a printed word or digit."""
TEXTURES = 256
"""Background textures shared by all pictures."""
MIN_INK = 12
"""Pixels of one object, of a patch's 196, that make the patch an object patch."""


@dataclass(frozen=True)
class Shape:
    """One drawn shape: its words, size class (0 small, 1 medium, 2 large) and cell of the 3x3 grid."""

    colour: str
    shape: str
    size: int
    row: int
    column: int
    x: float
    y: float
    radius: float

    @property
    def place(self) -> str:
        """The word that answers where this shape is."""
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Text:
    """One printed word or digit and its cell of the 3x3 grid."""

    word: str
    row: int
    column: int

    @property
    def place(self) -> str:
        """The word that answers where the text is."""
        return PLACES[self.row][self.column]


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is true of it."""

    split: str
    index: int
    pixels: npt.NDArray[np.uint8]
    """RGB, shape [size, size, 3]."""
    owner: npt.NDArray[np.int64]
    """Per patch in raster order, shape [patches]: -1 background, -2 touched by less than `MIN_INK`, else
    the number of the object that covers most of it: its index in `shapes`, or `len(shapes)` for the
    text."""
    prominence: npt.NDArray[np.float32]
    """Per patch, shape [patches]: the object's pixels in it relative to the patch that shows most of that
    object; 0 on the background."""
    shapes: tuple[Shape, ...]
    text: Text | None

    @property
    def object_patches(self) -> npt.NDArray[np.bool_]:
        """Which patches show a shape or the text, shape [patches]."""
        return self.owner >= 0

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The colour-shape pairs that questions about this scene may name."""
        return ALL_PAIRS if self.split == "test" else SEEN_PAIRS


def scene_seed(split: str, index: int) -> int:
    """The seed of one scene; ranges of different splits never meet.

    Raises:
        ValueError: unknown split, or an index outside the split's range.
    """
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: use one of {', '.join(SPLITS)}.")
    if not 0 <= index < SCENES_PER_SPLIT:
        raise ValueError(f"Scene index {index} is outside the split: use 0 to {SCENES_PER_SPLIT - 1}.")
    return SPLITS[split] * SCENES_PER_SPLIT + index


def check_size(size: int) -> None:
    """Refuse the side of a picture that patches do not fill.

    Raises:
        ValueError: it is no positive multiple of `PATCH`.
    """
    if size <= 0 or size % PATCH:
        raise ValueError(f"Image size {size} must be a positive multiple of the patch size {PATCH}.")


def make_scene(split: str, index: int, size: int = BASE_SIZE) -> Scene:
    """Draw scene `index` of a split as a `size` x `size` picture (a multiple of `PATCH`)."""
    check_size(size)
    rng = random.Random(scene_seed(split, index))
    scale = size / BASE_SIZE
    image = Image.fromarray(_background(rng, size))
    _clutter(ImageDraw.Draw(image), rng, size, scale)

    pairs = rng.sample(ALL_PAIRS if split == "test" else SEEN_PAIRS, rng.randint(1, 6))
    cells = rng.sample([(row, column) for row in range(3) for column in range(3)], len(pairs) + 1)
    shapes = tuple(_place(rng, pair, cell, scale) for pair, cell in zip(pairs, cells, strict=False))
    owner = Image.new("L", (size, size), 0)
    draw, mark = ImageDraw.Draw(image), ImageDraw.Draw(owner)
    for number, shape in enumerate(shapes):
        fill = tuple(min(255, max(0, level + rng.randint(-10, 10))) for level in COLOURS[shape.colour])
        _draw_shape(draw, shape, fill)
        _draw_shape(mark, shape, number + 1)
    text = None
    if rng.random() < TEXT_SHARE:
        text = Text(rng.choice(WORDS if rng.random() < 0.6 else DIGITS), *cells[-1])
        _draw_text(draw, mark, rng, text, len(shapes) + 1, scale)
    pixels = np.asarray(image)
    return Scene(split, index, pixels, *patch_owner(np.asarray(owner), len(shapes) + 1), shapes, text)


def _place(rng: random.Random, pair: tuple[str, str], cell: tuple[int, int], scale: float) -> Shape:
    size = rng.randrange(3)
    x, y = (28 + 56 * at + rng.uniform(-4, 4) for at in (cell[1], cell[0]))
    return Shape(*pair, size, *cell, x * scale, y * scale, rng.uniform(*RADII[size]) * scale)


def patch_owner(
    marks: npt.NDArray[np.uint8], numbers: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """`Scene.owner` and `Scene.prominence` from a picture of object numbers, 0 for the background."""
    side = marks.shape[0] // PATCH
    blocks = marks.reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3).reshape(side * side, PATCH * PATCH)
    ink = np.stack([np.count_nonzero(blocks == number, 1) for number in range(1, numbers + 1)], 1)
    owner, most = ink.argmax(1), ink.max(1)
    prominence = most / np.maximum(1, ink.max(0))[owner]
    return (
        np.where(most >= MIN_INK, owner, np.where(most > 0, -2, -1)).astype(np.int64),
        prominence.astype(np.float32),
    )


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, fill: int | tuple[int, ...]) -> None:
    x, y, r = shape.x, shape.y, shape.radius
    if shape.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif shape.shape == "square":
        half = 0.88 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif shape.shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    elif shape.shape == "diamond":
        draw.polygon([(x, y - r), (x - r, y), (x, y + r), (x + r, y)], fill=fill)
    elif shape.shape == "cross":
        arm = r / 3
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
    else:
        corners = [(-math.pi / 2 + k * math.pi / 5, r if k % 2 == 0 else 0.42 * r) for k in range(10)]
        draw.polygon([(x + d * math.cos(a), y + d * math.sin(a)) for a, d in corners], fill=fill)


def _draw_text(
    draw: ImageDraw.ImageDraw,
    mark: ImageDraw.ImageDraw,
    rng: random.Random,
    text: Text,
    number: int,
    scale: float,
) -> None:
    letters = font(round((22 if text.word in WORDS else 34) * scale))
    at = tuple((28 + 56 * cell + rng.uniform(-4, 4)) * scale for cell in (text.column, text.row))
    shade = rng.choice(((250, 250, 250), (10, 10, 10)))
    draw.text((at[0], at[1]), text.word, fill=shade, font=letters, anchor="mm")
    mark.fontmode = "1"  # no smoothing: the mark is a number, not a shade
    mark.text((at[0], at[1]), text.word, fill=number, font=letters, anchor="mm")


@lru_cache
def font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, the same on every machine."""
    return ImageFont.load_default(pixels)


@lru_cache(maxsize=TEXTURES)
def _texture(number: int, size: int) -> npt.NDArray[np.int16]:
    """One of the backgrounds that pictures crop: grain over blotches, stripes, checks or nothing.

    Shape [size + margin, size + margin, 3], levels around zero. Drawing one anew costs more than the rest
    of a scene.
    """
    rng = np.random.default_rng(number)
    side = size + size // 3
    picture = rng.normal(0, 7, (side, side, 3))
    kind = ("plain", "blotches", "stripes", "checks")[number % 4]
    if kind == "blotches":
        coarse = Image.fromarray(
            rng.normal(0, 16, (cells := int(rng.integers(5, 16)), cells)).astype(np.float32)
        )
        picture += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))[..., None]
    elif kind != "plain":
        angle, period = rng.uniform(0, math.pi), rng.uniform(8, 30) * size / BASE_SIZE
        line = np.arange(side) * (2 * math.pi / period)
        wave = np.sin(line[:, None] * math.sin(angle) + line[None, :] * math.cos(angle))
        if kind == "checks":
            wave = np.sign(wave) * np.sign(
                np.sin(line[:, None] * math.cos(angle) - line[None, :] * math.sin(angle))
            )
        picture += (rng.uniform(4, 12) * wave)[..., None]
    return np.rint(picture).astype(np.int16)


def _background(rng: random.Random, size: int) -> npt.NDArray[np.uint8]:
    """A muted colour under a random crop of one texture, shape [size, size, 3]."""
    texture = _texture(rng.randrange(TEXTURES), size)
    top, left = rng.randrange(size // 3), rng.randrange(size // 3)
    colour = np.array([rng.randint(90, 165) for _ in range(3)], np.int16)
    picture: npt.NDArray[np.uint8] = (
        (texture[top : top + size, left : left + size] + colour).clip(0, 255).astype(np.uint8)
    )
    return picture


def _clutter(draw: ImageDraw.ImageDraw, rng: random.Random, size: int, scale: float) -> None:
    """Thin lines and dots of any colour that no question asks about; the shapes are drawn over them."""
    for _ in range(rng.randint(0, 6)):
        x, y = rng.uniform(0, size), rng.uniform(0, size)
        fill = tuple(rng.randint(20, 235) for _ in range(3))
        if rng.random() < 0.5:
            dot = rng.uniform(1.5, 3) * scale
            draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=fill)
        else:
            angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(10, 40) * scale
            end = (x + length * math.cos(angle), y + length * math.sin(angle))
            draw.line((x, y, *end), fill=fill, width=max(1, round(scale)))
