# SPDX-License-Identifier: Apache-2.0
"""Stage 1's rules: which vision tokens of an image stay. Plain torch; knows nothing of vLLM."""

from vllm_vtprune.selection.base import Selection, SelectionMethod, share_count
from vllm_vtprune.selection.features import VisionFeatures
from vllm_vtprune.selection.inflection import Curve, inflection_counts, score_curve, slope_of
from vllm_vtprune.selection.registry import DEFAULT_METHOD, METHODS, get_method, needs_of
from vllm_vtprune.selection.scores import SCORE_NEEDS, SCORES, get_score

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "SCORES",
    "SCORE_NEEDS",
    "Curve",
    "Selection",
    "SelectionMethod",
    "VisionFeatures",
    "get_method",
    "get_score",
    "inflection_counts",
    "needs_of",
    "score_curve",
    "share_count",
    "slope_of",
]
