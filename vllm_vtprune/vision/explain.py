# SPDX-License-Identifier: Apache-2.0
"""Why these vision tokens stay: scores, sorted curve and cut of one image, as serving computes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_vtprune.selection.base import SelectionMethod, share_count
from vllm_vtprune.selection.inflection import inflection_counts, score_curve
from vllm_vtprune.selection.registry import get_method
from vllm_vtprune.selection.scores import get_score
from vllm_vtprune.vision.crop import crop_of
from vllm_vtprune.vision.processor import PrunedLlavaMultiModalProcessor

if TYPE_CHECKING:
    from vllm_vtprune.settings import VisionSettings


@dataclass(frozen=True, slots=True)
class Explanation:
    """What stage 1 does to one image. N patches, in raster order unless said otherwise.

    Attributes:
        grid: rows and columns of the patches.
        crop: the part of the picture the grid covers: left, top, width and height as fractions of its size.
        image_size: width and height of the decoded picture, in pixels.
        score: name of the score.
        scores: the score of each patch.
        order: patches by falling score.
        curve: the scores in that order, normalised to 1 at the first and 0 at the last.
        cut: how many patches lie before the curve's cut; None where the settings or the method do not cut the
            curve, and for equal scores, which have no inflection point.
        kept: whether each patch stays.
        merged: whether the patches that do not stay are folded into tokens that do.
        summary_tokens: tokens that stand for merged patches alone, beside those that stay.
        vision_tokens: vision tokens before pruning.
        vision_tokens_kept: vision tokens the language model is given.
    """

    grid: tuple[int, int]
    crop: dict[str, float]
    image_size: tuple[int, int]
    score: str
    scores: list[float]
    order: list[int]
    curve: list[float]
    cut: int | None
    kept: list[bool]
    merged: bool
    summary_tokens: int
    vision_tokens: int
    vision_tokens_kept: int


def explain(
    processor: PrunedLlavaMultiModalProcessor,
    image: Any,
    settings: VisionSettings,
    media_io_kwargs: Mapping[str, Any] | None = None,
) -> Explanation:
    """Run an image through the tower, its cache and the selection, and keep what serving throws away.

    Args:
        processor: the model's.
        image: what vLLM's media connector returns (`MediaWithBytes` around a PIL image), or a PIL image.
        settings: the request's, whose `score` is shown, whatever the method ranks by.
        media_io_kwargs: with which the image was decoded.

    Raises:
        ValueError: the image cannot be preprocessed, or its scores are not finite.
    """
    features = processor.vision_features(image, settings, media_io_kwargs)
    method = get_method(settings.method)
    selection = method.select(features, settings)[0]
    scores = get_score(settings.score)(features)
    curve = score_curve(scores)
    tokens = features.tokens
    cut: int | None = None
    constant = bool(curve.scores[0, 0] == curve.scores[0, -1])
    follows_curve = type(method).counts is SelectionMethod.counts and settings.keep_ratio is None
    if follows_curve and settings.aggressiveness and not constant:
        cut = int(inflection_counts(scores, settings.aggressiveness, settings.min_tokens)[0])
        if cut > share_count(settings.max_share, tokens, settings.min_tokens):
            cut = None  # the ceiling decides, and not the curve
    kept = [False] * tokens
    for index in selection.indices.tolist():
        kept[index] = True
    # with the "full" strategy CLS goes to the language model too, ahead of the patches
    extra = int(processor.vision.encoder.with_cls)
    size = picture_size(image)
    return Explanation(
        grid=features.grid,
        crop=crop_of(size, processor.info.get_hf_processor().image_processor),
        image_size=size,
        score=settings.score,
        scores=scores[0].tolist(),
        order=curve.order[0].tolist(),
        curve=curve.y[0].tolist(),
        cut=cut,
        kept=kept,
        merged=selection.features is not None,
        summary_tokens=selection.count - sum(kept),
        vision_tokens=tokens + extra,
        vision_tokens_kept=selection.count + extra,
    )


def picture_size(image: Any) -> tuple[int, int]:
    """Width and height in pixels of a PIL image, or of one that vLLM wrapped with its bytes."""
    width, height = getattr(image, "media", image).size
    return int(width), int(height)
