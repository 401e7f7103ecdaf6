# SPDX-License-Identifier: Apache-2.0
"""How relevant each unit of a picture is to the question: what methods with `reads_question` are given.

By a CLIP checkpoint's text tower where the operator names one, as CDPruner does (arXiv 2506.10967), else by
the language model's own input embeddings, a question's rows of which are read from the checkpoint.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vllm_vtprune.errors import CheckpointError, PolicyError
from vllm_vtprune.families.base import Family, Kept, Projected, TowerOutput
from vllm_vtprune.selection.ops import cosines
from vllm_vtprune.vision.checkpoint import EmbeddingRows
from vllm_vtprune.vision.features import everything

logger = logging.getLogger(__name__)

Project = Callable[[Sequence[Kept]], Sequence[Projected]]
#: Questions of which the encoded form is kept.
_KNOWN = 256
#: Segments of a question that CLIP's text tower reads; later ones are passed over.
_MOST_SEGMENTS = 4


class QuestionRater(ABC):
    """Rates units by a question. Thread-safe; holds nothing of a request but its encoded question."""

    @abstractmethod
    def rate(self, output: TowerOutput, question: str) -> Tensor | None:
        """[N] float32 on the tower's device, the higher the more relevant; None for an empty question."""


class EmbeddingRater(QuestionRater):
    """The mean cosine of a unit's embedding with those of the question's tokens.

    Both are what the language model is given. No tower is run and no weight is kept: a fallback that works
    with every family, not a published method (OpenVINO's CDPruner rates by the same two).

    Args:
        family: the model's adapter.
        project: the projector.
        tokenize: token ids of a text, special tokens left out.
        rows: the language model's input embeddings.
    """

    def __init__(
        self,
        family: Family,
        project: Project,
        tokenize: Callable[[str], Sequence[int]],
        rows: EmbeddingRows,
    ) -> None:
        self._family = family
        self._project = project
        self._read = lru_cache(_KNOWN)(lambda question: rows.read(tokenize(question)))

    @torch.inference_mode()
    def rate(self, output: TowerOutput, question: str) -> Tensor | None:
        """See the class."""
        tokens: Tensor = self._read(question)
        if not tokens.shape[0]:
            return None
        ((embeddings, _),) = self._project([everything(output)])
        units = self._family.of_units(output, embeddings)
        return cosines(units, tokens.to(units.device)).mean(dim=-1)


class ClipRater(QuestionRater):
    """CDPruner's relevance: the negative mean cosine with the question's segments in CLIP's common space.

    The negative, as in the paper's released code: in CLIP's space a patch that shows what the text names is
    less like the text than the background is (cf. LiteLVLM, arXiv 2605.13178).

    Args:
        model: a `transformers.CLIPModel` whose vision tower is the pruned model's own.
        tokenizer: its tokenizer.
        device: the tower's.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self._text = model.text_model.to(device).eval().requires_grad_(False)
        self._text_projection = model.text_projection.to(device).requires_grad_(False)
        self._norm = model.vision_model.post_layernorm.to(device).requires_grad_(False)
        self._projection = model.visual_projection.to(device).requires_grad_(False)
        self._tokenizer = tokenizer
        self._device = device
        self._encode = lru_cache(_KNOWN)(self._segments)

    @staticmethod
    def load(path: str, device: torch.device) -> ClipRater:
        """Load the text tower and both projections, in float32.

        Raises:
            PolicyError: there is no such checkpoint, or it is no CLIP.
        """
        from transformers import CLIPModel, CLIPTokenizer

        try:
            model = CLIPModel.from_pretrained(path, dtype=torch.float32)
            tokenizer = CLIPTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise PolicyError(f"text_tower {path!r} cannot be loaded as a CLIP model: {error}") from error
        logger.info("vtprune: text tower of %s on %s", path, device)
        return ClipRater(model, tokenizer, device)

    @torch.inference_mode()
    def rate(self, output: TowerOutput, question: str) -> Tensor | None:
        """See the class."""
        texts: Tensor | None = self._encode(question)
        if texts is None:
            return None
        units = self._projection(self._norm(output.patches.to(self._device, torch.float32)))
        return (-cosines(units, texts).mean(dim=-1)).to(output.patches.device)

    @torch.inference_mode()
    def _segments(self, question: str) -> Tensor | None:
        """[M, P] of the question's segments, each as long as the text tower reads."""
        ids = self._tokenizer(question, add_special_tokens=False).input_ids
        # begin and end take two places
        room = int(self._text.config.max_position_embeddings) - 2
        rows = []
        for start in range(0, min(len(ids), room * _MOST_SEGMENTS), room):
            segment = [self._tokenizer.bos_token_id, *ids[start : start + room], self._tokenizer.eos_token_id]
            pooled = self._text(torch.tensor([segment], device=self._device)).pooler_output
            rows.append(self._text_projection(pooled))
        return torch.cat(rows) if rows else None


def check_text_tower(path: str, family: Family) -> None:
    """Refuse, before an engine starts, a text tower that cannot rate this model's units.

    Raises:
        PolicyError: there is no such CLIP checkpoint, or its vision tower is of another shape.
    """
    from transformers import AutoConfig, CLIPConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"vtprune: text_tower {path!r} cannot be read: name the folder or Hugging Face id of the CLIP "
            f"model that the vision tower is from. ({error})"
        ) from error
    if not isinstance(config, CLIPConfig):
        raise PolicyError(f"vtprune: text_tower {path!r} is a {config.model_type!r} and no CLIP model.")
    if not family.clip_units:
        raise PolicyError(
            "vtprune: text_tower needs a model whose vision tokens are hidden states of a CLIP tower "
            "(LLaVA-1.5, LLaVA-NeXT), which this one's are not: leave it out, and the question is rated by "
            "the language model's own embeddings."
        )
    ours, theirs = family.config.vision_config, config.vision_config
    for name in ("hidden_size", "num_hidden_layers", "patch_size"):
        if getattr(ours, name) != getattr(theirs, name):
            raise PolicyError(
                f"vtprune: text_tower {path!r} has a vision tower with {name} {getattr(theirs, name)}, and "
                f"this model's has {getattr(ours, name)}: name the CLIP model that the tower is from."
            )


def question_rater(
    family: Family,
    project: Project,
    tokenizer: Any,
    model: str,
    *,
    device: torch.device,
    text_tower: str = "",
    revision: str | None = None,
    download_dir: str | None = None,
    dummy: bool = False,
) -> QuestionRater | None:
    """The rater that the operator's settings name.

    Args:
        family: the model's adapter.
        project: the projector.
        tokenizer: the model's.
        model: folder or hub id.
        device: where a text tower runs.
        text_tower: folder or hub id of a CLIP model; empty for the language model's embeddings.
        revision: of a hub id.
        download_dir: cache folder of the hub client.
        dummy: random weights, which say nothing of a question.

    Returns:
        None where the checkpoint's embeddings cannot be read; the methods then rate by the request's score.

    Raises:
        PolicyError: the text tower cannot be loaded.
    """
    if text_tower:
        return ClipRater.load(text_tower, device)
    if dummy or tokenizer is None:
        return None
    try:
        rows = EmbeddingRows.of(model, revision=revision, download_dir=download_dir)
    except CheckpointError as error:
        logger.warning("vtprune: %s cdpruner rates by the request's score instead of the question.", error)
        return None
    special = frozenset(getattr(tokenizer, "all_special_ids", ()))

    def tokenize(text: str) -> list[int]:
        return [i for i in tokenizer.encode(text, add_special_tokens=False) if i not in special]

    return EmbeddingRater(family, project, tokenize, rows)
