# SPDX-License-Identifier: Apache-2.0
"""The methods by name. A new one is added here and nowhere else; the tests run over this table."""

from collections.abc import Iterable

from vllm_vtprune.selection.base import SelectionMethod
from vllm_vtprune.selection.methods.aim_merge import AimMerge
from vllm_vtprune.selection.methods.cdpruner import CDPruner
from vllm_vtprune.selection.methods.dart import Dart
from vllm_vtprune.selection.methods.density_peaks import DensityPeaks
from vllm_vtprune.selection.methods.divprune import DivPrune
from vllm_vtprune.selection.methods.fastervlm import FasterVLM
from vllm_vtprune.selection.methods.hiprune import HiPrune
from vllm_vtprune.selection.methods.holov import HoloV
from vllm_vtprune.selection.methods.inflection import Inflection
from vllm_vtprune.selection.methods.inflection_diverse import InflectionDiverse
from vllm_vtprune.selection.methods.inflection_temporal import InflectionTemporal
from vllm_vtprune.selection.methods.pool import Pool
from vllm_vtprune.selection.methods.prumerge import PruMerge
from vllm_vtprune.selection.methods.prumerge_plus import PruMergePlus
from vllm_vtprune.selection.methods.random import Random
from vllm_vtprune.selection.methods.scope import Scope
from vllm_vtprune.selection.methods.topk import TopK
from vllm_vtprune.selection.methods.uniform import Uniform
from vllm_vtprune.selection.methods.visionzip import VisionZip
from vllm_vtprune.selection.methods.vispruner import VisPruner
from vllm_vtprune.selection.methods.vtc_cls import VtcCls

DEFAULT_METHOD = "inflection"

_CLASSES: tuple[type[SelectionMethod], ...] = (
    Inflection,
    InflectionDiverse,
    InflectionTemporal,
    TopK,
    Random,
    Uniform,
    Pool,
    FasterVLM,
    VtcCls,
    HiPrune,
    DivPrune,
    Scope,
    CDPruner,
    VisPruner,
    HoloV,
    Dart,
    VisionZip,
    PruMerge,
    PruMergePlus,
    AimMerge,
    DensityPeaks,
)

METHODS: dict[str, SelectionMethod] = {method.name: method() for method in _CLASSES}


def get_method(name: str) -> SelectionMethod:
    """The method of that name.

    Raises:
        ValueError: when there is none; the message lists those there are.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def needs_of(names: Iterable[str]) -> frozenset[str]:
    """The optional fields of `VisionFeatures` the named methods read; a score's own are in `SCORE_NEEDS`.

    Raises:
        ValueError: when a name is unknown.
    """
    return frozenset[str]().union(*(get_method(name).needs for name in names))
