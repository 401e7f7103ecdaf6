# SPDX-License-Identifier: Apache-2.0
"""From settings and tower outputs to what stays: stage 1's selection, image by image, view by view."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vllm_vtprune.errors import SettingsError
from vllm_vtprune.families.base import OPTIONAL_OUTPUTS, Family, Kept, TowerOutput, View
from vllm_vtprune.selection.base import Selection
from vllm_vtprune.selection.features import VisionFeatures
from vllm_vtprune.selection.registry import METHODS, get_method
from vllm_vtprune.selection.scores import SCORE_NEEDS, SCORES
from vllm_vtprune.settings import AUTO_SCORE, VisionSettings

#: A view by the number of its image among those at hand, and its own number in it.
ViewKey = tuple[int, int]


def for_family(settings: VisionSettings, family: Family, score: str = AUTO_SCORE) -> VisionSettings:
    """The settings with a score where they leave it open.

    Args:
        settings: a request's.
        family: the model's.
        score: the operator's, where one was chosen; else the family's own counts.

    Raises:
        SettingsError: a score or a method that this family's tower cannot serve.
    """
    if settings.score == AUTO_SCORE:
        settings = replace(settings, score=family.default_score if score == AUTO_SCORE else score)
    if settings.keeps_all:
        return settings
    check_servable(family, settings.score, (settings.method,))
    return settings


def check_servable(family: Family, score: str, methods: Iterable[str]) -> None:
    """Refuse what a family's tower cannot serve.

    Raises:
        SettingsError: the score or one of the methods; its `param` is "score" or "method".
    """
    scores, able = servable_scores(family), servable_methods(family)
    if score not in scores:
        raise SettingsError(
            f"The score {score!r} needs {', '.join(sorted(SCORE_NEEDS[score]))}, which this model's vision "
            f"tower does not give; choose among {', '.join(scores)}.",
            "score",
        )
    if unable := [repr(name) for name in methods if name not in able]:
        many = len(unable) > 1
        raise SettingsError(
            f"The method{'s' * many} {', '.join(unable)} {'do' if many else 'does'} not work with this "
            f"model's vision tower; choose among {', '.join(able)}.",
            "method",
        )


def servable_scores(family: Family) -> tuple[str, ...]:
    """The scores that a family's tower can give."""
    return tuple(name for name in SCORES if SCORE_NEEDS[name] <= family.outputs)


def servable_methods(family: Family) -> tuple[str, ...]:
    """The methods that work with a family: they read what its tower gives and add no token out of place."""
    return tuple(
        name
        for name, method in METHODS.items()
        if method.needs <= family.outputs and (family.adds_tokens or not method.adds_tokens)
    )


def needs_of(settings: Iterable[VisionSettings]) -> frozenset[str]:
    """The optional outputs of the tower that methods and scores read; of settings that keep all, none."""
    pruning = [s for s in settings if not s.keeps_all]
    needs = (get_method(s.method).needs | SCORE_NEEDS[s.score] for s in pruning)
    return frozenset[str]().union(*needs) & OPTIONAL_OUTPUTS


def seed_of(key: str) -> int:
    """64 bits from a key that names an image's content."""
    try:
        return int(key[:16], 16)
    except ValueError:  # a client's id that the operator trusts
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest())


def stack(
    outputs: Sequence[TowerOutput], seeds: Sequence[int], relevance: Sequence[Tensor | None] = ()
) -> list[tuple[list[ViewKey], VisionFeatures]]:
    """The views of some images in batches of equal grids, as selection takes them.

    Args:
        outputs: the images'.
        seeds: per image; each of its views gets one of its own.
        relevance: per image [N] of its units, to the request's question; none of any image where one is None.

    Returns:
        Per batch which views are in it, and their features.
    """
    groups: dict[tuple[int, int], list[ViewKey]] = {}
    for i, output in enumerate(outputs):
        for v, view in enumerate(output.views):
            groups.setdefault(view.grid, []).append((i, v))
    return [(keys, _features(outputs, keys, grid, seeds, relevance)) for grid, keys in groups.items()]


def select(
    outputs: Sequence[TowerOutput],
    keys: Sequence[str],
    settings: VisionSettings,
    relevance: Sequence[Tensor | None] = (),
) -> list[Kept]:
    """What stays of some images, by one request's settings.

    Args:
        outputs: the images', with what `needs_of` names.
        keys: their contents', from which randomness comes.
        settings: the request's, with a score by name.
        relevance: as in `stack`.

    Raises:
        ValueError: features or scores hold NaN or infinity.
    """
    if settings.keeps_all:
        return [everything(output) for output in outputs]
    method = get_method(settings.method)
    chosen: dict[ViewKey, Selection] = {}
    for views, features in stack(outputs, [seed_of(key) for key in keys], relevance):
        chosen |= zip(views, method.select(features, settings), strict=True)
    return [
        kept_of(output, [chosen[i, v] for v in range(len(output.views))]) for i, output in enumerate(outputs)
    ]


def everything(output: TowerOutput) -> Kept:
    """An image of which nothing is dropped."""
    return Kept(output, torch.arange(output.patches.shape[0], device=output.patches.device), output.patches)


def kept_of(output: TowerOutput, selections: Sequence[Selection]) -> Kept:
    """What stays of an image, from what stays of its views."""
    if len(selections) == 1:
        return Kept(output, selections[0].indices, selections[0].gather(output.patches))
    pairs = list(zip(output.views, selections, strict=True))
    units = torch.cat([view.start + selection.indices for view, selection in pairs])
    tokens = torch.cat([selection.gather(output.patches[view.units]) for view, selection in pairs])
    return Kept(output, units, tokens)


def _features(
    outputs: Sequence[TowerOutput],
    keys: Sequence[ViewKey],
    grid: tuple[int, int],
    seeds: Sequence[int],
    relevance: Sequence[Tensor | None] = (),
) -> VisionFeatures:
    views = [(outputs[i], outputs[i].views[v]) for i, v in keys]

    def stacked(name: str) -> Tensor | None:
        rows = [_of_view(output, name, view) for output, view in views]
        return None if any(row is None for row in rows) else torch.stack(rows)  # type: ignore[arg-type]

    rated = [relevance[i] if relevance else None for i, _ in keys]
    asked = [
        None if r is None else r[outputs[i].views[v].units] for r, (i, v) in zip(rated, keys, strict=True)
    ]
    cls = [None if outputs[i].cls is None else outputs[i].cls[v] for i, v in keys]  # type: ignore[index]
    return VisionFeatures(
        patches=torch.stack([output.patches[view.units] for output, view in views]),
        cls=None if any(row is None for row in cls) else torch.stack(cls),  # type: ignore[arg-type]
        grid=grid,
        seeds=tuple((seeds[i] + v) % 2**64 for i, v in keys),
        relevance=None if any(row is None for row in asked) else torch.stack(asked),  # type: ignore[arg-type]
        frames=_frames(outputs, keys),
        **{name: stacked(name) for name in OPTIONAL_OUTPUTS},
    )


def _frames(outputs: Sequence[TowerOutput], keys: Sequence[ViewKey]) -> tuple[int, ...]:
    """Of how many consecutive frames each video in a batch consists; empty where there is none."""
    if all(outputs[i].modality != "video" for i, _ in keys):
        return ()
    sizes = []
    for i, views in itertools.groupby(i for i, _ in keys):
        count = len(list(views))
        # tiles of a picture do not follow each other in time
        sizes += [count] if outputs[i].modality == "video" else [1] * count
    return tuple(sizes)


def _of_view(output: TowerOutput, name: str, view: View) -> Tensor | None:
    values: Tensor | None = getattr(output, name)
    if values is None:
        return None
    return values[view.units] if name == "keys" else values[:, view.units]
