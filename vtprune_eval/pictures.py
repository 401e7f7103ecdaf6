# SPDX-License-Identifier: Apache-2.0
"""Stage 1 over a set of pictures: the tower once, then any number of selections."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from vllm_vtprune.selection import SCORE_NEEDS, Selection, VisionFeatures, get_method, needs_of
from vllm_vtprune.selection.base import Pruning, keep_all, required
from vllm_vtprune.settings import VisionSettings
from vllm_vtprune.vision.encoder import VisionEncoder
from vtprune_eval.setting import Setting

_BATCH = 32


def outputs_for(visions: Sequence[VisionSettings]) -> frozenset[str]:
    """The tower's optional outputs that these settings read."""
    pruning = [vision for vision in visions if not vision.keeps_all]
    scores = frozenset[str]().union(*(SCORE_NEEDS[vision.score] for vision in pruning))
    return (needs_of(vision.method for vision in pruning) | scores) - {"cls"}


@dataclass
class EncodedPictures:
    """What the tower computed for P pictures, in batches, and the encoder that projects what stays.

    Attributes:
        encoder: tower and projector.
        batches: features of up to 32 pictures each.
    """

    encoder: VisionEncoder
    batches: list[VisionFeatures]

    @property
    def tokens(self) -> int:
        """N, the patches of one picture."""
        return self.batches[0].tokens

    @staticmethod
    def encode(
        encoder: VisionEncoder,
        images: Sequence[Image.Image],
        image_processor: object,
        outputs: frozenset[str],
    ) -> EncodedPictures:
        """Run the tower over all pictures.

        Args:
            encoder: the checkpoint's.
            images: RGB pictures.
            image_processor: the checkpoint's.
            outputs: optional outputs, see `outputs_for`.
        """
        batches = []
        for first in range(0, len(images), _BATCH):
            chosen = list(images[first : first + _BATCH])
            pixels = image_processor(images=chosen, return_tensors="pt").pixel_values  # type: ignore[operator]
            encoded = encoder.encode(pixels, outputs)
            batches.append(
                VisionFeatures(
                    patches=torch.stack([e.patches for e in encoded]),
                    cls=torch.stack([e.cls for e in encoded]),
                    grid=encoder.grid,
                    seeds=tuple(_seed(image) for image in chosen),
                    **{name: torch.stack([getattr(e, name) for e in encoded]) for name in outputs},
                )
            )
        return EncodedPictures(encoder, batches)

    def select(self, setting: Setting) -> list[Selection]:
        """What stays of each picture, [P]."""
        return [chosen for batch in self.batches for chosen in _select(batch, setting)]

    def counts(self, setting: Setting) -> list[int]:
        """How many tokens of each picture stay, [P], though they be others than a selection method's."""
        return [selection.count for selection in self.select(Setting(setting.counted))]

    def embed(self, selections: Sequence[Selection]) -> list[Tensor]:
        """The embeddings the language model is given, per picture [k, hidden]."""
        rows = iter(selections)
        embeddings: list[Tensor] = []
        for batch in self.batches:
            images = zip(batch.patches, required(batch.cls), strict=True)
            embeddings += self.encoder.project([(next(rows).gather(patches), cls) for patches, cls in images])
        return embeddings


def _select(features: VisionFeatures, setting: Setting) -> list[Selection]:
    if setting.vision.keeps_all:
        return [keep_all(features)] * len(features.seeds)
    method = get_method(setting.vision.method)
    if setting.like is None:
        return method.select(features, setting.vision)
    # a baseline keeps, picture by picture, what the method it is compared with keeps
    counts = [selection.count for selection in _select(features, Setting(setting.like))]
    drawn = replace(features, seeds=tuple(seed + setting.draw for seed in features.seeds))
    return list(method.choose(Pruning(drawn, setting.vision), counts))


def _seed(image: Image.Image) -> int:
    return int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=7).digest())
