# SPDX-License-Identifier: Apache-2.0
"""What a model family tells the rest: its tower, what that computes, and how kept units become embeddings.

A unit is the smallest thing that can be dropped: a patch, or a 2x2 block of patches where the model merges
them. A view is a part of the picture with a softmax of its own, the whole of it or a tile; scores of
different views are not comparable, so each is pruned by its own curve.

An image's N units stand view after view, each view's in raster order. The prompt holds T places for its
embeddings before pruning: T = N where every place is a unit's, more where the model adds embeddings of its
own, such as a newline after each row of patches.

A video is an image whose views are its frames, in the order of time. A frame is what the model gives a grid
of units of its own: two sampled pictures in the Qwens, one elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor, nn

from vllm_vtprune.selection.scores import SCORE_NEEDS
from vllm_vtprune.vision.captured import Graphs

#: Attention received, of the layers that `vision.attention.read_layers` names.
RECEIVED = frozenset({"received", "received_midway"})
#: Optional outputs of a tower (fields of `selection.VisionFeatures`) that cost extra work.
OPTIONAL_OUTPUTS = RECEIVED | {"cls_attention", "keys"}


#: A crop that is the whole picture.
WHOLE = {"left": 0.0, "top": 0.0, "width": 1.0, "height": 1.0}


@dataclass(frozen=True, slots=True)
class Item:
    """One image or video as the model's own class would be given it.

    Attributes:
        inputs: the image processor's outputs: pixel_values, image_grid_thw, image_sizes, ...
        on_host: those of them that the engine is given too, because it computes positions from them.
        places: T, embeddings of the unpruned image.
        modality: `image` or `video`.
    """

    inputs: Mapping[str, Tensor]
    on_host: Mapping[str, Tensor] = field(default_factory=dict)
    places: int = 0
    modality: str = "image"


@dataclass(frozen=True, slots=True)
class View:
    """A part of the picture with a softmax of its own.

    Attributes:
        grid: rows and columns of its units.
        start: its first unit.
    """

    grid: tuple[int, int]
    start: int = 0

    @property
    def units(self) -> slice:
        """Its units among the image's."""
        return slice(self.start, self.start + self.grid[0] * self.grid[1])


@dataclass(frozen=True, slots=True)
class TowerOutput:
    """What the tower computed for one image, apart from any request's settings.

    Attributes:
        patches: [N, D] units, what `Family.project` takes.
        views: the V views, which together hold the N units.
        cls: [V, D] hidden state of CLS in each view; None for a tower without one.
        cls_attention: [L, N] head-mean attention from CLS, the last layer is the feature layer.
        received: [1, N] attention received in the feature layer, mean over heads and queries.
        received_midway: [1, N] as `received`, in the layer that `vision.attention.read_layers` names.
        keys: [N, Dk] attention keys of the feature layer, heads concatenated.
        on_host: as in `Item`.
        places: as in `Item`.
        modality: as in `Item`; a video's views are its frames.
    """

    patches: Tensor
    views: tuple[View, ...] = ()
    cls: Tensor | None = None
    cls_attention: Tensor | None = None
    received: Tensor | None = None
    received_midway: Tensor | None = None
    keys: Tensor | None = None
    on_host: Mapping[str, Tensor] = field(default_factory=dict)
    places: int = 0
    modality: str = "image"

    @property
    def outputs(self) -> frozenset[str]:
        """Which optional outputs are there."""
        return frozenset(name for name in OPTIONAL_OUTPUTS if getattr(self, name) is not None)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        optional = (getattr(self, name) for name in OPTIONAL_OUTPUTS)
        tensors = (self.patches, self.cls, *optional, *self.on_host.values())
        return sum(t.nbytes for t in tensors if t is not None)


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of one image.

    Attributes:
        output: the tower's.
        units: [k] int64, ascending.
        tokens: [k', D] features of the kept units; k' > k where a method adds tokens that stand for several,
            after each view's own.
    """

    output: TowerOutput
    units: Tensor
    tokens: Tensor

    @property
    def added(self) -> int:
        """Tokens that stand for several units."""
        return self.tokens.shape[0] - self.units.shape[0]


Projected = tuple[Tensor, Tensor]
"""Embeddings [k', E], and their places [k'], ascending, among the T of the unpruned image."""


class Family(ABC):
    """One model family, made from a checkpoint's configuration.

    Attributes:
        outputs: the fields of `selection.VisionFeatures` the tower can give, beyond the patches.
        default_score: what ranks tokens where nobody says.
        default_method: the selection method where nobody says.
        prefixes: prefix of a weight's name in the checkpoint -> prefix in the module of `build`; the first
            that fits counts, after a leading "model." was taken off.
        adds_tokens: whether a method may add tokens of its own. Not where places have coordinates.
        clip_units: whether a unit is a hidden state of a CLIP tower, which CLIP's own projection takes.
        captures: whether its passes can be captured as CUDA graphs: not where a pass has as many patches as
            its pictures have, or its Python reads the device.
        modalities: what is pruned, of `image` and `video`; the rest passes through vLLM's own tower.
        fewest_frames: sampled pictures that a video has at least.
    """

    outputs: frozenset[str] = RECEIVED
    default_score: str = "received"
    default_method: ClassVar[str] = "inflection"
    prefixes: ClassVar[Mapping[str, str]]
    adds_tokens: ClassVar[bool] = False
    clip_units: bool = False
    captures: ClassVar[bool] = False
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    fewest_frames: ClassVar[int] = 1

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def check(self) -> None:
        """Refuse at start what cannot be pruned.

        Raises:
            CheckpointError: the configuration asks for something this adapter does not know.
        """

    @abstractmethod
    def build(self) -> nn.Module:
        """Tower and projector from transformers' own classes, named as `prefixes` says; on the CPU."""

    @abstractmethod
    def encode(self, modules: Any, items: Sequence[Item], outputs: frozenset[str]) -> list[TowerOutput]:
        """Run the tower over some images, their tensors on its device; each result in memory of its own."""

    @abstractmethod
    def project(self, modules: Any, images: Sequence[Kept]) -> list[Projected]:
        """Embeddings of what stays, all images in one pass where the tower allows it."""

    def of_units(self, output: TowerOutput, embeddings: Tensor) -> Tensor:
        """[N, E] of every unit, E the language model's width, from what `project` makes of a whole image."""
        # behind what is no unit; of what the engine is given, the embedding comes first
        width = int(self.config.get_text_config().hidden_size)
        return embeddings[-output.patches.shape[0] :, :width]

    @abstractmethod
    def patches(self, item: Item) -> int:
        """Patches that the tower sees of an image: what a pass costs grows with them."""

    @abstractmethod
    def unpruned_grid(self) -> tuple[int, int] | None:
        """Rows and columns of every image's units; None where they depend on the image."""

    def places(self) -> int | None:
        """T of every image; None where it depends on the image."""
        return None

    def warm_up(  # noqa: B027
        self, modules: Any, like: Tensor, sets: Collection[frozenset[str]], graphs: Graphs | None
    ) -> None:
        """What need not wait for the first image; in inference mode.

        Args:
            modules: as in `encode`.
            like: any tensor on their device and in their dtype.
            sets: the sets of optional outputs that most requests want.
            graphs: how passes are captured; None: not, as always where `captures` is false.
        """

    def usual_outputs(self) -> list[frozenset[str]]:
        """The sets of optional outputs that requests want which name no score and no method."""
        score = SCORE_NEEDS[self.default_score] & OPTIONAL_OUTPUTS
        return [frozenset(), score] if score else [frozenset()]

    def embed_width(self) -> int:
        """E, what the engine is given per place."""
        return int(self.config.get_text_config().hidden_size)

    def bounded(self, image: Image.Image, image_processor: Any) -> Image.Image:
        """The picture, without parts that are never looked at but cost gigabytes to resize.

        Raises:
            ValueError: the picture is too long and narrow.
        """
        return image

    def advance(self, on_host: Mapping[str, Tensor]) -> int | None:
        """Positions that an image's embeddings take in the rotary embedding; None: as many as there are."""
        return None

    def table(self, max_model_len: int) -> int | None:
        """Positions that the engine's rotary table holds; None: no prompt can exceed it."""
        return None

    def crops(
        self, size: tuple[int, int], image_processor: Any, output: TowerOutput
    ) -> list[dict[str, float]]:
        """Which part of the picture each view covers, as `vision.crop.crop_of` gives it.

        Args:
            size: width and height of the picture in pixels.
            image_processor: the checkpoint's.
            output: the tower's for this picture.
        """
        return [WHOLE]

    def rename(self, key: str) -> str | None:
        """A weight's name in the module of `build`; None: not one of its weights."""
        name = key.removeprefix("model.")
        for prefix, new in self.prefixes.items():
            if name.startswith(prefix):
                return new + name.removeprefix(prefix)
        return None

    def arrange(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `rename` named, as the module of `build` has it: split where the checkpoint joins."""
        return weights
