# SPDX-License-Identifier: Apache-2.0
"""What the slow and plain versions of the selection methods share."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_vtprune.selection import Selection, VisionFeatures, get_method
from vllm_vtprune.settings import VisionSettings

GRID = (5, 8)


TOKENS = 40


Array = NDArray[np.float64]


CPU = torch.device("cpu")


ratios = pytest.mark.parametrize("ratio", [0.01, 0.1, 0.22, 0.5, 0.9])


image_numbers = pytest.mark.parametrize("number", range(4))


def features(number: int) -> VisionFeatures:
    generator = torch.Generator().manual_seed(number)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    attention = [(2 * draw(8, TOKENS)).softmax(-1) for _ in range(2)]
    return VisionFeatures(
        draw(TOKENS, 6),
        draw(6),
        GRID,
        (number,),
        cls_attention=attention[0],
        received=attention[1][:, -1:],
        received_midway=attention[1][:, 2:3],
        keys=draw(TOKENS, 5),
    )


def field(given: VisionFeatures, name: str) -> Array:
    """The first image's field as float64; of a field per layer, the feature layer."""
    values = getattr(given, name)[0].double().numpy()
    return np.asarray(values[-1] if name == "cls_attention" or name.startswith("received") else values)


def select(name: str, given: VisionFeatures, ratio: float) -> Selection:
    return get_method(name).select(given, VisionSettings(keep_ratio=ratio))[0]


def kept(selection: Selection) -> list[int]:
    return [int(index) for index in selection.indices]


def top(scores: Array, count: int) -> list[int]:
    return sorted(np.argsort(-scores, kind="stable")[:count].tolist())


def cosines(left: Array, right: Array) -> Array:
    def unit(rows: Array) -> Array:
        return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))

    return np.asarray(unit(left) @ unit(right).T)
