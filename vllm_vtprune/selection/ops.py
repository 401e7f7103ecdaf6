# SPDX-License-Identifier: Apache-2.0
"""Tensor operations the methods share; equal values go to the earlier position.

None but `read_counts` waits for the device. Besides reading values that rules out boolean indexing,
`nonzero`, `torch.tensor` and `torch.where` with a Python number, which copy between host and device behind
the scenes.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize


def best_first(values: Tensor) -> Tensor:
    """Positions along the last dimension by falling value; equal values by rising position."""
    return values.argsort(dim=-1, descending=True, stable=True)


def ranks(values: Tensor) -> Tensor:
    """[..., N] int64: a token's place along the last dimension by falling value, 0 for the first."""
    return best_first(values).argsort(dim=-1)


def complement(indices: Tensor, size: int) -> Tensor:
    """[size - k] int64, ascending: what is left of 0 to size - 1 without the k unique `indices`."""
    taken = torch.zeros(size, dtype=torch.int8, device=indices.device).index_fill(0, indices, 1)
    return taken.argsort(stable=True)[: size - indices.shape[0]]


def evenly(count: int, size: int, device: torch.device) -> Tensor:
    """[count] int64, ascending and unique: the middles of `count` equal stretches of 0 to size - 1."""
    return (2 * torch.arange(count, device=device) + 1) * size // (2 * max(count, 1))


def cosines(left: Tensor, right: Tensor) -> Tensor:
    """[..., M, N] float32 cosine of every row of `left` [..., M, D] with every row of `right` [..., N, D]."""
    return normalize(left.float(), dim=-1) @ normalize(right.float(), dim=-1).transpose(-1, -2)


def membership(group: Tensor, groups: int) -> Tensor:
    """[groups, M] float32: 1 where `group`[m] = g. Its product with [M, D] sums groups deterministically."""
    return (torch.arange(groups, device=group.device).unsqueeze(1) == group.unsqueeze(0)).float()


def pick_one_by_one(
    values: Tensor, first: Tensor, lower: Callable[[Tensor, Tensor], Tensor], steps: int
) -> Tensor:
    """Greedy choice: the highest value again and again, while each pick lowers the values of the others.

    The picks do not depend on `steps`, so images of one batch that keep different counts share the loop.

    Args:
        values: [B, N] before any pick.
        first: [B] int64, the first pick.
        lower: maps values [B, N] and the picks [B] just made to the new values.
        steps: how many tokens to pick, at most N.

    Returns:
        [B, steps] int64, unique per image, in the order they were picked.
    """
    pick = first
    picks = [pick]
    taken = torch.zeros_like(values, dtype=torch.bool)
    for _ in range(steps - 1):
        taken = taken.scatter(1, pick.unsqueeze(1), True)
        values = lower(values, pick)
        pick = values.masked_fill(taken, -torch.inf).argmax(dim=-1)
        picks.append(pick)
    return torch.stack(picks, dim=1)


def read_counts(counts: Tensor, checked: Mapping[str, Tensor]) -> list[int]:
    """Bring `counts` [B] to the host, and in the same transfer whether every value in `checked` is finite.

    This is the only wait for the device in a selection.

    Raises:
        ValueError: naming the image and what was not finite.
    """
    # An image's largest magnitude tells, as NaN prevails in a maximum: far cheaper than testing every value.
    largest = [values.flatten(1).abs().amax(dim=1) for values in checked.values()]
    host = torch.stack([counts, *(torch.isfinite(values).to(counts.dtype) for values in largest)]).tolist()
    for name, flags in zip(checked, host[1:], strict=True):
        if 0 in flags:
            raise ValueError(
                f"NaN or infinity in {name} of image {flags.index(0)}: the vision tower overflowed or was "
                "given bad pixels; try a wider dtype for it (float32 or bfloat16)"
            )
    return [int(count) for count in host[0]]
