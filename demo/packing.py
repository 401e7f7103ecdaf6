# SPDX-License-Identifier: Apache-2.0
"""Many questions about one picture in one sequence, each seeing the picture and itself but no other question.

Every question keeps the positions it has when it is asked alone, so that the packed answers are the answers
that the prompt `USER: <image> question ASSISTANT:` gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from demo.model import ASSISTANT, END, IGNORE, PAD, START, USER, VOCABULARY, words_of
from vtprune_eval.scene_questions import SceneQuestion

PREFIX = (START, USER)
"""Tokens before the picture."""
_PADDING = -2


@dataclass(frozen=True)
class Packed:
    """A batch of packed prompts; the picture's tokens stand between `PREFIX` and the questions.

    `tokens` int64 [B, T] of the questions and answers; `positions` int64 [B, L] and `visible` bool [B, 1,
    L, L] over the whole sequence, L = len(PREFIX) + most kept + T; `asking` bool [B, L]: where an answer's
    token is predicted; `targets` int64 [asked] the tokens to predict there; `first` bool [asked]: the
    answer's word, not the end after it.
    """

    tokens: Tensor
    positions: Tensor
    visible: Tensor
    asking: Tensor
    targets: Tensor
    first: Tensor


def pack(
    questions: list[list[SceneQuestion]],
    kept: Tensor,
    device: torch.device,
    prefix: Sequence[int] = PREFIX,
    behind: Sequence[int] = (),
) -> Packed:
    """Pack each picture's questions behind its `kept` tokens, int64 [B]; shorter ones are padded.

    Between `prefix` and each question's words stand the picture and the tokens of `behind`.
    """
    rows: list[list[tuple[int, int, int, int]]] = []  # token, segment, position, target
    for asked in questions:
        row: list[tuple[int, int, int, int]] = []
        for segment, question in enumerate(asked, start=1):
            prompt = [*behind, *words_of(question.text), ASSISTANT]
            answer = VOCABULARY[question.answer]
            tokens = [*prompt, answer]
            targets = [IGNORE] * (len(prompt) - 1) + [answer, END]
            row += [
                (token, segment, place, target)
                for place, (token, target) in enumerate(zip(tokens, targets, strict=True))
            ]
        rows.append(row)
    longest, before = max(map(len, rows)), len(prefix) + int(kept.max())
    filled = torch.tensor([row + [(PAD, -1, 0, IGNORE)] * (longest - len(row)) for row in rows])
    batch = len(rows)
    place = torch.arange(before).expand(batch, -1)
    end = len(prefix) + kept[:, None]
    segments = torch.cat([torch.where(place < end, 0, _PADDING), filled[..., 1]], 1)
    positions = torch.cat([place, end + filled[..., 2]], 1)
    wanted = torch.cat([torch.full((batch, before), IGNORE), filled[..., 3]], 1)
    same = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(same.shape[-2:], dtype=torch.bool).tril()
    visible = (same | (segments == 0)[:, None, :]) & causal
    asking = wanted != IGNORE
    chosen = wanted[asking]
    arrays = (filled[..., 0], positions, visible[:, None], asking, chosen, chosen != END)
    return Packed(*(array.to(device) for array in arrays))


def answer_logits(model: LlavaForConditionalGeneration, projected: Tensor, packed: Packed) -> Tensor:
    """Logits where an answer is predicted, [asked, vocabulary], given projected patches [B, kept, width]."""
    language = model.model.language_model
    prefix = torch.tensor(PREFIX, device=projected.device).expand(len(projected), -1)
    embed = language.embed_tokens
    inputs = torch.cat([embed(prefix), projected, embed(packed.tokens)], 1)
    states = language(
        inputs_embeds=inputs, attention_mask=packed.visible, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    logits: Tensor = model.lm_head(states[packed.asking])
    return logits
