# SPDX-License-Identifier: Apache-2.0
"""Why these vision tokens stay: scores, sorted curve and cut of one image, as serving computes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_vtprune.selection.base import Selection, SelectionMethod, share_count
from vllm_vtprune.selection.features import VisionFeatures
from vllm_vtprune.selection.inflection import inflection_counts, score_curve
from vllm_vtprune.selection.registry import get_method
from vllm_vtprune.selection.scores import get_score
from vllm_vtprune.vision.features import for_family, kept_of, needs_of, seed_of, stack
from vllm_vtprune.vision.processor import PrunedProcessor

if TYPE_CHECKING:
    from vllm_vtprune.families.base import TowerOutput
    from vllm_vtprune.settings import VisionSettings


@dataclass(frozen=True, slots=True)
class ViewExplanation:
    """What stage 1 does to one view, the whole picture or a tile: N units, in raster order by default.

    Attributes:
        grid: rows and columns of the units.
        crop: the part of the picture the grid covers: left, top, width and height as fractions of its size.
        scores: the score of each unit.
        order: units by falling score.
        curve: the scores in that order, normalised to 1 at the first and 0 at the last.
        cut: how many units lie before the curve's cut; None where the settings or the method do not cut the
            curve, and for equal scores, which have no inflection point.
        kept: whether each unit stays.
        merged: whether the units that do not stay are folded into tokens that do.
        summary_tokens: tokens that stand for merged units alone, beside those that stay.
    """

    grid: tuple[int, int]
    crop: dict[str, float]
    scores: list[float]
    order: list[int]
    curve: list[float]
    cut: int | None
    kept: list[bool]
    merged: bool
    summary_tokens: int


@dataclass(frozen=True, slots=True)
class Explanation(ViewExplanation):
    """What stage 1 does to one image; of its views the first.

    Attributes:
        more_views: the other parts of the picture that are pruned each by a curve of their own: tiles.
        image_size: width and height of the decoded picture, in pixels.
        score: name of the score.
        vision_tokens: vision tokens before pruning.
        vision_tokens_kept: vision tokens the language model is given.
    """

    more_views: list[ViewExplanation]
    image_size: tuple[int, int]
    score: str
    vision_tokens: int
    vision_tokens_kept: int


def explain(
    processor: PrunedProcessor,
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
    settings = for_family(settings, processor.family)
    output, key = tower_output(processor, image, settings, media_io_kwargs)
    size = picture_size(image)
    crops = processor.family.crops(size, processor.info.get_hf_processor().image_processor, output)
    selections: dict[int, Selection] = {}
    views: dict[int, ViewExplanation] = {}
    for numbers, features in stack([output], [seed_of(key)], processor.relevance([output], settings)):
        chosen = get_method(settings.method).select(features, settings)
        scores = get_score(settings.score)(features)
        for row, ((_, number), selection) in enumerate(zip(numbers, chosen, strict=True)):
            selections[number] = selection
            views[number] = _view(features, scores[row : row + 1], selection, settings, crops[number])
    kept = kept_of(output, [selections[v] for v in sorted(selections)])
    (projected,) = processor.vision.project([kept])
    first, *others = (views[v] for v in sorted(views))
    return Explanation(
        **asdict(first),
        more_views=others,
        image_size=size,
        score=settings.score,
        vision_tokens=output.places,
        vision_tokens_kept=projected[1].shape[0],
    )


def tower_output(
    processor: PrunedProcessor,
    image: Any,
    settings: VisionSettings,
    media_io_kwargs: Mapping[str, Any] | None = None,
) -> tuple[TowerOutput, str]:
    """What selection is given for one image, and its content key, through the tower and cache of serving.

    Args:
        processor: the model's.
        image: a PIL image, alone or as vLLM's media connector wraps it.
        settings: decide which optional outputs the tower computes.
        media_io_kwargs: with which the image was decoded; they are part of its key in the cache.

    Raises:
        ValueError: the image cannot be preprocessed.
    """
    keyed = processor.keys.of_image(image, media_io_kwargs)
    # the score, whatever stays
    shown = replace(settings, keep_ratio=0.5, aggressiveness=None)
    (output,) = processor.encode([keyed], needs_of([shown]))
    return output, keyed.key


def _view(
    features: VisionFeatures,
    scores: Any,
    selection: Selection,
    settings: VisionSettings,
    crop: dict[str, float],
) -> ViewExplanation:
    """One view's, from its scores [1, N]."""
    method = get_method(settings.method)
    curve = score_curve(scores)
    cut: int | None = None
    constant = bool(curve.scores[0, 0] == curve.scores[0, -1])
    follows_curve = type(method).counts is SelectionMethod.counts and settings.keep_ratio is None
    if follows_curve and settings.aggressiveness and not constant:
        cut = int(inflection_counts(scores, settings.aggressiveness, settings.min_tokens)[0])
        if cut > share_count(settings.max_share, features.tokens, settings.min_tokens):
            cut = None  # the ceiling decides, and not the curve
    kept = [False] * features.tokens
    for index in selection.indices.tolist():
        kept[index] = True
    return ViewExplanation(
        grid=features.grid,
        crop=crop,
        scores=scores[0].tolist(),
        order=curve.order[0].tolist(),
        curve=curve.y[0].tolist(),
        cut=cut,
        kept=kept,
        merged=selection.features is not None,
        summary_tokens=selection.count - sum(kept),
    )


def picture_size(image: Any) -> tuple[int, int]:
    """Width and height in pixels of a PIL image, or of one that vLLM wrapped with its bytes."""
    width, height = getattr(image, "media", image).size
    return int(width), int(height)
