# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks of whatever answers the questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_vtprune.errors import VTPruneError
from vtprune_eval.setting import Setting
from vtprune_eval.tasks import Questions


class RunnerError(VTPruneError, ValueError):
    """The model or the server cannot do what was asked; the message says what to change."""


@dataclass(frozen=True)
class Reply:
    """What one question got.

    Attributes:
        text: the answer.
        vision_tokens: of the picture, before pruning.
        vision_tokens_kept: given to the language model.
        prompt_tokens: given to the language model, the picture's included.
        prompt_tokens_kept: that stay above the first prune layer.
        kept_above: that stay above each further prune layer.
    """

    text: str
    vision_tokens: int
    vision_tokens_kept: int
    prompt_tokens: int
    prompt_tokens_kept: int
    kept_above: tuple[int, ...] = ()

    @property
    def by_band(self) -> tuple[int, ...]:
        """Prompt tokens that each band of the decoder sees, from the lowest up."""
        return (self.prompt_tokens, self.prompt_tokens_kept, *self.kept_above)

    @property
    def unpruned_tokens(self) -> int:
        """Length of the prompt before any pruning."""
        return self.prompt_tokens + self.vision_tokens - self.vision_tokens_kept


class Runner(Protocol):
    """Answers the questions it was made with."""

    @property
    def name(self) -> str:
        """The model, for reports."""
        ...

    @property
    def layers(self) -> int | None:
        """Decoder layers; None where unknown."""
        ...

    @property
    def draws(self) -> int:
        """How many different draws of `random` it can make."""
        ...

    @property
    def baselines(self) -> Sequence[str]:
        """The names of `setting.BASELINES` that it can run."""
        ...

    def answer(self, setting: Setting) -> Sequence[Reply]:
        """One reply per question, in their order.

        Raises:
            RunnerError: the setting cannot be run.
        """
        ...

    @property
    def questions(self) -> Questions:
        """What is asked."""
        ...
