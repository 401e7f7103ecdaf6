# SPDX-License-Identifier: Apache-2.0
"""How much each patch is worth."""

from collections.abc import Callable

from torch import Tensor
from torch.linalg import vector_norm

from vllm_vtprune.selection.features import VisionFeatures

Score = Callable[[VisionFeatures], Tensor]

# Where a vector is zero its cosine is 0, not NaN.
_SHORTEST = 1e-12


def cosine(features: VisionFeatures) -> Tensor:
    """[B, N] cosine between the CLS token's hidden state and each patch's (arXiv 2409.01162, our reading)."""
    cls = _given(features, "cls", "cosine")
    patches, cls = features.patches.float(), cls.float().unsqueeze(1)
    lengths: Tensor = vector_norm(patches, dim=-1) * vector_norm(cls, dim=-1)
    return (patches * cls).sum(dim=-1) / lengths.clamp(min=_SHORTEST)


def cls_attention(features: VisionFeatures) -> Tensor:
    """[B, N] attention the CLS token pays to each patch in the feature layer, mean over heads."""
    return _given(features, "cls_attention", "cls_attention")[:, -1].float()


def received(features: VisionFeatures) -> Tensor:
    """[B, N] mean attention a patch receives in the feature layer: for encoders without a CLS token."""
    return _given(features, "received", "received")[:, -1].float()


SCORES: dict[str, Score] = {"cosine": cosine, "cls_attention": cls_attention, "received": received}

# The optional field of VisionFeatures that each score reads.
SCORE_NEEDS: dict[str, frozenset[str]] = {
    "cosine": frozenset({"cls"}),
    "cls_attention": frozenset({"cls_attention"}),
    "received": frozenset({"received"}),
}


def get_score(name: str) -> Score:
    """The scoring function of that name.

    Raises:
        ValueError: when there is none; the message lists those there are.
    """
    if name not in SCORES:
        raise ValueError(f"unknown score {name!r}: choose one of {', '.join(sorted(SCORES))}")
    return SCORES[name]


def _given(features: VisionFeatures, field: str, score: str) -> Tensor:
    values: Tensor | None = getattr(features, field)
    if values is None:
        others = ", ".join(sorted(SCORES.keys() - {score}))
        raise ValueError(
            f"the score {score!r} needs {field}, which this encoder does not give: choose among {others}"
        )
    return values
