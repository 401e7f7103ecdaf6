# SPDX-License-Identifier: Apache-2.0
"""What a selection method is given, what it returns, and the mechanics every method shares.

The way of the data: features and budget -> scores -> counts -> (one transfer to the host) -> kept tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from vllm_vtprune.selection.features import VisionFeatures
from vllm_vtprune.selection.inflection import inflection_counts
from vllm_vtprune.selection.ops import read_counts
from vllm_vtprune.selection.scores import DEFAULT_SCORE, get_score


@dataclass(frozen=True)
class Budget:
    """How many vision tokens of each image stay; one request's.

    `keep_ratio` decides where it is given, then `aggressiveness`; with neither, everything stays.

    Args:
        aggressiveness: in [0, 1]: 0 keeps everything, 0.5 cuts at the knee of the score's curve, 1 keeps the
            minimum.
        keep_ratio: in (0, 1]: the same share of every image.
        min_tokens: at least this many stay (all of them where the image has fewer).
        score: whose curve is cut and by which `inflection` ranks: "cosine", "cls_attention" or "received".

    Raises:
        ValueError: when a value is out of its range or the score is unknown.
    """

    aggressiveness: float | None = None
    keep_ratio: float | None = None
    min_tokens: int = 1
    score: str = DEFAULT_SCORE

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.aggressiveness is not None and not 0.0 <= self.aggressiveness <= 1.0:
            raise ValueError(f"aggressiveness must be between 0 and 1, not {self.aggressiveness}")
        if self.keep_ratio is not None and not 0.0 < self.keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio must be above 0 and at most 1, not {self.keep_ratio}")
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens must be at least 1, not {self.min_tokens}")
        get_score(self.score)

    @property
    def keeps_everything(self) -> bool:
        """True where no token can be dropped, whatever the image shows."""
        return self.keep_ratio == 1.0 or (self.keep_ratio is None and not self.aggressiveness)


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
    """One request's images and budget: the case a method works on."""

    features: VisionFeatures
    budget: Budget

    @cached_property
    def scores(self) -> Tensor:
        """[B, N] float32 scores by the budget's rule, the higher the better; not yet checked for NaN."""
        return get_score(self.budget.score)(self.features)

    def checked(self, method: "SelectionMethod") -> dict[str, Tensor]:
        """What goes into the result and must be finite, by name: each a tensor whose first dimension is B."""
        tensors = {"patches": self.features.patches}
        tensors |= {name: getattr(self.features, name) for name in sorted(method.needs)}
        if method.ranks_by_score or "scores" in self.__dict__:
            tensors[f"the score {self.budget.score!r}"] = self.scores
        return tensors


class SelectionMethod(ABC):
    """One rule for which vision tokens stay. A subclass writes `choose`.

    Methods hold no state, so one instance serves all requests. `name` is the contract's; `needs` names the
    optional fields of `VisionFeatures` the rule reads, beyond what the budget's score reads (`SCORE_NEEDS`);
    `ranks_by_score` says that the rule reads that score, too, and not only the count. `adds_tokens` says that
    tokens may follow the kept ones that stand for several patches and have no place of their own.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    ranks_by_score: ClassVar[bool] = False
    adds_tokens: ClassVar[bool] = False

    def select(self, features: VisionFeatures, budget: Budget) -> list[Selection]:
        """Choose what stays of each of the B images; the device is waited for at most once.

        Returns:
            One `Selection` per image, on the features' device. Where everything stays, nothing is merged.

        Raises:
            ValueError: when a field the method needs is missing, or features or scores hold NaN or infinity.
        """
        tokens = features.tokens
        if budget.keeps_everything:
            return [keep_all(features) for _ in features.seeds]
        missing = sorted(name for name in self.needs if getattr(features, name) is None)
        if missing:
            raise ValueError(
                f"the method {self.name!r} needs {', '.join(missing)}, which this encoder does not give"
            )
        pruning = Pruning(features, budget)
        counts = read_counts(self.counts(pruning), pruning.checked(self))
        if min(counts) == tokens:
            return [keep_all(features) for _ in counts]
        chosen = self.choose(pruning, counts)
        return [
            keep_all(features) if count == tokens else selection
            for count, selection in zip(counts, chosen, strict=True)
        ]

    def counts(self, pruning: Pruning) -> Tensor:
        """How many tokens stay of each image: [B] int64 on the device.

        The budget decides, so that methods compare at equal counts. One with its own rule overrides this.
        """
        patches, budget = pruning.features.patches, pruning.budget
        if budget.keep_ratio is not None:
            count = share_count(budget.keep_ratio, pruning.features.tokens, budget.min_tokens)
            return torch.full(patches.shape[:1], count, dtype=torch.int64, device=patches.device)
        return inflection_counts(pruning.scores, budget.aggressiveness or 0.0, budget.min_tokens)

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
    """max(ceil(ratio * tokens), min_tokens), at most `tokens`.

    The ratio is the decimal number the user wrote: 0.07 of 100 is 7, though 0.07 * 100 > 7 in floating point.
    """
    share = math.ceil(Fraction(repr(float(ratio))) * tokens)
    return min(max(share, min_tokens), tokens)
