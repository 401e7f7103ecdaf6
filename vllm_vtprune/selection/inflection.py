# SPDX-License-Identifier: Apache-2.0
"""How many tokens stay: the inflection point of an image's sorted scores.

After arXiv 2409.01162, which cuts the long-tailed curve of CLS-to-patch similarity at its inflection point
but publishes neither code nor the exact rule. What stands here is our reading: the point where the normalised
curve's slope falls to -lambda, found as the minimum of y + lambda x, so that lambda = 1 is the point farthest
below the chord (the knee). Past the knee the tail is gone, and a share 1 / lambda of what is left stays.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Values of the objective closer than this are ties. Its terms are float64 in [0, 1], with rounding near
# 1e-16, and scores are float32, so this absorbs rounding and nothing else: a straight curve, where all k tie
# at lambda = 1, is cut at the smallest. Because the tolerance is fixed the count stays monotone in
# aggressiveness.
_TIE = 1e-12
# A share of a count within this of a whole number is that number: the share is a rounded quotient.
_WHOLE = 1e-9


class Curve(NamedTuple):
    """Sorted scores of B images and the normalised curve the cut is made on.

    Attributes:
        order: [B, N] int64, token positions by falling score; equal scores by rising position.
        scores: [B, N] float64, the scores in that order.
        x: [N] float64, (k - 1) / (N - 1) for k = 1 to N.
        y: [B, N] float64, (s_k - s_N) / (s_1 - s_N); all ones where the scores of an image are equal.
    """

    order: Tensor
    scores: Tensor
    x: Tensor
    y: Tensor


def score_curve(scores: Tensor) -> Curve:
    """Sort `scores` [B, N] downward, per image, and normalise both axes to [0, 1]."""
    ranked, order = torch.sort(scores.double(), dim=-1, descending=True, stable=True)
    tokens = scores.shape[-1]
    x = torch.arange(tokens, dtype=torch.float64, device=scores.device) / max(tokens - 1, 1)
    span = ranked[:, :1] - ranked[:, -1:]
    y = ((ranked - ranked[:, -1:]) / span).masked_fill(span == 0, 1.0)
    return Curve(order, ranked, x, y)


def slope_of(aggressiveness: float) -> float:
    """Lambda = a / (1 - a), the slope the curve is cut at: 0 at a = 0, 1 (the knee) at 0.5, infinite at 1."""
    return aggressiveness / (1.0 - aggressiveness) if aggressiveness < 1.0 else math.inf


def inflection_counts(scores: Tensor, aggressiveness: float, min_tokens: int = 1) -> Tensor:
    """Tokens that stay of each image, without waiting for the device.

    Up to the knee (lambda <= 1) k* = argmin_k (y_k + lambda x_k), the smallest k on ties. Past it k* is the
    knee's count divided by lambda, rounded up: a picture full of objects has a plateau of high scores before
    its tail, and there the minimum of a steeper line jumps from the plateau's end to its first token, so that
    crowded pictures would keep the fewest tokens. The count never rises with `aggressiveness`: 0 keeps
    everything, 1 keeps the minimum. Equal scores have no inflection point: everything stays, at any setting.

    Args:
        scores: [B, N], finite (`scores.read_counts` refuses others when the counts are read).
        aggressiveness: in [0, 1]; `slope_of` maps it to lambda.
        min_tokens: the floor, itself at most N.

    Returns:
        [B] int64 on the scores' device.

    Raises:
        ValueError: when `aggressiveness` is out of range.
    """
    if not 0.0 <= aggressiveness <= 1.0:
        raise ValueError(f"aggressiveness must be between 0 and 1, not {aggressiveness}")
    images, tokens = scores.shape
    if aggressiveness == 0.0:
        return torch.full((images,), tokens, dtype=torch.int64, device=scores.device)
    curve = score_curve(scores)
    objective = curve.y + min(slope_of(aggressiveness), 1.0) * curve.x
    lowest = objective.amin(dim=-1, keepdim=True)
    # argmax returns the first of equal maxima, here the first k that reaches the minimum.
    cut = (objective <= lowest + _TIE).to(torch.int8).argmax(dim=-1) + 1
    if aggressiveness > 0.5:
        share = (1.0 - aggressiveness) / aggressiveness
        cut = (cut * share - _WHOLE).ceil().long()
    constant = curve.scores[:, 0] == curve.scores[:, -1]
    return cut.clamp(min=min(min_tokens, tokens)).masked_fill(constant, tokens)
