# SPDX-License-Identifier: Apache-2.0
"""What a selection method is given, what it returns, and the mechanics every method shares.

The way of the data: features and settings -> scores -> counts -> (one transfer to the host) -> kept tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vtprune.selection.features import VisionFeatures
from vllm_vtprune.selection.inflection import inflection_counts
from vllm_vtprune.selection.ops import read_counts
from vllm_vtprune.selection.scores import get_score
from vllm_vtprune.settings import VisionSettings
from vllm_vtprune.share import share_of


@dataclass(frozen=True)
class Selection:
    """What stays of one image.

    Args:
        indices: [k] int64, ascending and unique: the patches kept, in raster order.
        features: None where the kept patches stay as they are. A method that merges returns [k', D]: first
            the new features of `indices`, in that order, then any summary token that belongs to no single
            patch (k' >= k).
    """

    indices: Tensor
    features: Tensor | None = None

    @property
    def count(self) -> int:
        """Vision tokens the language model is given for this image: k, or k' where the method merges."""
        return (self.indices if self.features is None else self.features).shape[0]

    def gather(self, patches: Tensor) -> Tensor:
        """The kept tokens [count, D], given the image's `patches` [N, D]; those themselves where all stay."""
        if self.features is not None:
            return self.features
        return patches if self.count == patches.shape[0] else patches.index_select(0, self.indices)


@dataclass(frozen=True)
class Pruning:
    """One request's images and settings: the case a method works on."""

    features: VisionFeatures
    settings: VisionSettings

    @cached_property
    def scores(self) -> Tensor:
        """[B, N] float32 scores by the settings' rule, the higher the better; not yet checked for NaN."""
        return get_score(self.settings.score)(self.features)

    def checked(self, method: "SelectionMethod") -> dict[str, Tensor]:
        """What goes into the result and must be finite, by name: each a tensor whose first dimension is B."""
        tensors = {"patches": self.features.patches}
        tensors |= {name: getattr(self.features, name) for name in sorted(method.needs)}
        if method.ranks_by_score or "scores" in self.__dict__:
            tensors[f"the score {self.settings.score!r}"] = self.scores
        if self.features.relevance is not None:
            tensors["the relevance to the question"] = self.features.relevance
        return tensors


class SelectionMethod(ABC):
    """One rule for which vision tokens stay. A subclass writes `choose`.

    Methods hold no state, so one instance serves all requests. `name` is the contract's; `needs` names the
    optional fields of `VisionFeatures` the rule reads, beyond what the settings' score reads (`SCORE_NEEDS`);
    `ranks_by_score` says that the rule reads that score, too, and not only the count. `adds_tokens` says that
    tokens may follow the kept ones that stand for several patches and have no place of their own;
    `reads_question` that the rule reads the relevance to the request's question, where there is one.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    ranks_by_score: ClassVar[bool] = False
    adds_tokens: ClassVar[bool] = False
    reads_question: ClassVar[bool] = False

    def select(self, features: VisionFeatures, settings: VisionSettings) -> list[Selection]:
        """Choose what stays of each of the B images; the device is waited for at most once.

        Returns:
            One `Selection` per image, on the features' device. Where everything stays, nothing is merged.

        Raises:
            ValueError: when the score is unknown, a field the method needs is missing, or features or scores
                hold NaN or infinity.
        """
        tokens = features.tokens
        get_score(settings.score)
        if settings.keeps_all:
            return [keep_all(features) for _ in features.seeds]
        missing = sorted(name for name in self.needs if getattr(features, name) is None)
        if missing:
            raise ValueError(
                f"the method {self.name!r} needs {', '.join(missing)}, which this encoder does not give"
            )
        pruning = Pruning(features, settings)
        most = share_count(settings.max_share, tokens, settings.min_tokens)
        asked = self.spread(self.counts(pruning).clamp(max=most), pruning)
        counts = read_counts(asked, pruning.checked(self))
        if min(counts) == tokens:
            return [keep_all(features) for _ in counts]
        chosen = self.choose(pruning, counts)
        return [
            keep_all(features) if count == tokens else selection
            for count, selection in zip(counts, chosen, strict=True)
        ]

    def counts(self, pruning: Pruning) -> Tensor:
        """How many tokens stay of each image: [B] int64 on the device.

        The settings decide, so that methods compare at equal counts. One with its own rule overrides this.
        """
        patches, settings = pruning.features.patches, pruning.settings
        if settings.keep_ratio is not None:
            count = share_count(settings.keep_ratio, pruning.features.tokens, settings.min_tokens)
            return torch.full(patches.shape[:1], count, dtype=torch.int64, device=patches.device)
        return inflection_counts(pruning.scores, settings.aggressiveness or 0.0, settings.min_tokens)

    def spread(self, counts: Tensor, pruning: Pruning) -> Tensor:
        """The counts [B] as they are; a rule that sees time moves them between the frames of a video."""
        return counts

    @abstractmethod
    def choose(self, pruning: Pruning, counts: Sequence[int]) -> list[Selection]:
        """Which tokens stay: a `Selection` of exactly `counts[b]` tokens per image, without a device sync."""


def required(values: Tensor | None) -> Tensor:
    """A field named in `needs`, which `select` has seen to be there."""
    if values is None:
        raise ValueError("a method read a field of VisionFeatures that its `needs` does not name")
    return values


def keep_all(features: VisionFeatures) -> Selection:
    """The selection that prunes nothing."""
    return Selection(torch.arange(features.tokens, device=features.patches.device))


def share_count(ratio: float, tokens: int, min_tokens: int = 1) -> int:
    """`share_of`, but at least `min_tokens` and at most `tokens`."""
    return min(max(share_of(ratio, tokens), min_tokens), tokens)
