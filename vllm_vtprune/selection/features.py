# SPDX-License-Identifier: Apache-2.0
"""What the vision tower computed: the input of every selection method."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VisionFeatures:
    """What the vision tower computed for B images of equal size, apart from any request's setting.

    Args:
        patches: [B, N, D] hidden states of the feature layer, what the projector takes.
        cls: [B, D] hidden state of the CLS token at the same layer; None for an encoder without one.
        grid: (rows, columns) of the patches, which are in raster order: N = rows * columns.
        seeds: one 64-bit integer per image, derived from its content, so that randomness follows the image.
        cls_attention: [B, L, N] attention the CLS token pays to each patch, mean over heads, for every layer
            up to and including the feature layer, which is the last.
        received: [B, 1, N] attention each patch receives in the feature layer, mean over heads and queries.
        received_midway: [B, 1, N] the same in a middle layer, at 9/24 of the depth or nearest to it.
        keys: [B, N, Dk] attention keys of the feature layer, heads concatenated.
        relevance: [B, N] how relevant each patch is to the request's question; None where there is none, or
            nothing that rates it.
        frames: how many of the B images, one after the other, are the consecutive frames of one video; 1 for
            a picture. They sum to B; empty where all are pictures.

    Raises:
        ValueError: when shapes disagree.
    """

    patches: Tensor
    cls: Tensor | None
    grid: tuple[int, int]
    seeds: tuple[int, ...]
    cls_attention: Tensor | None = None
    received: Tensor | None = None
    received_midway: Tensor | None = None
    keys: Tensor | None = None
    relevance: Tensor | None = None
    frames: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse shapes that disagree."""
        if self.patches.ndim != 3 or 0 in self.patches.shape:
            raise ValueError(f"patches must be a non-empty [B, N, D], not {list(self.patches.shape)}")
        images, tokens, width = self.patches.shape
        if self.grid[0] * self.grid[1] != tokens:
            raise ValueError(f"a grid of {self.grid} does not hold {tokens} patches")
        if len(self.seeds) != images:
            raise ValueError(f"{len(self.seeds)} seeds for {images} images: give one per image")
        if self.cls is not None and self.cls.shape != (images, width):
            raise ValueError(f"cls must be [{images}, {width}], not {list(self.cls.shape)}")
        for name in ("cls_attention", "received", "received_midway"):
            attention = getattr(self, name)
            if attention is not None and (
                attention.ndim != 3 or attention.shape[1] == 0 or attention.shape[::2] != (images, tokens)
            ):
                raise ValueError(f"{name} must be [{images}, L, {tokens}], not {list(attention.shape)}")
        if self.keys is not None and (self.keys.ndim != 3 or self.keys.shape[:2] != (images, tokens)):
            raise ValueError(f"keys must be [{images}, {tokens}, Dk], not {list(self.keys.shape)}")
        if self.relevance is not None and self.relevance.shape != (images, tokens):
            raise ValueError(f"relevance must be [{images}, {tokens}], not {list(self.relevance.shape)}")
        if self.frames and (sum(self.frames) != images or min(self.frames) < 1):
            raise ValueError(f"videos of {list(self.frames)} frames are not {images} images")

    @property
    def tokens(self) -> int:
        """N, the vision tokens of each image before pruning."""
        return self.patches.shape[1]
