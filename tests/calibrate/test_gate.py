# SPDX-License-Identifier: Apache-2.0
"""DyVTE's gate: it learns what can be told from its features, and reads the text's hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import random_llava
from vtprune_calibrate.gate import fires, make_gate, train
from vtprune_eval.borders import Prompt
from vtprune_eval.transformers_backend import LocalModel


def test_a_gate_learns_which_answers_survive() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(400, 16, generator=generator)
    survives = (features[:, 0] + features[:, 9] > 0).long()
    gate = train(make_gate(8), features[:300], survives[:300])
    right = torch.from_numpy(fires(gate, features[300:])) == survives[300:].bool()
    assert right.float().mean() > 0.9
    again = train(make_gate(8), features[:300], survives[:300])
    assert (fires(again, features) == fires(gate, features)).all()


def test_a_gate_reads_the_text_behind_the_picture(tmp_path: Path) -> None:
    """Against one prompt at a time, through transformers' own hidden states."""
    model = LocalModel(str(random_llava(tmp_path / "llava", layers=3)))
    decoder, hidden = model.decoder, model.decoder.language.config.hidden_size
    pictures = [torch.randn(5, hidden), torch.randn(9, hidden)]
    prompts = [Prompt((1, 5), 0, (7, 8, 9)), Prompt((1,), 1, (7,)), Prompt((1,), 1, (9, 8, 7, 6))]
    found = decoder.text_states(pictures, prompts, [1, 2])
    assert found.shape == (2, 3, 2 * hidden)
    embed = decoder.language.embed_tokens
    for at, prompt in enumerate(prompts):
        before, after = (embed(torch.tensor(ids)) for ids in (prompt.before, prompt.after))
        whole = torch.cat([before, pictures[prompt.picture], after])[None]
        states = decoder.language(inputs_embeds=whole, output_hidden_states=True).hidden_states
        for number, layer in enumerate((1, 2)):
            text = states[layer][0, -len(prompt.after) :]
            behind = text[:-1] if len(text) > 1 else text
            expected = torch.cat([behind.mean(0), text[-1]])
            torch.testing.assert_close(found[number, at], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("hidden", [4, 32])
def test_a_gate_is_as_wide_as_the_paper_s(hidden: int) -> None:
    assert sum(weight.numel() for weight in make_gate(hidden).parameters()) == 2 * hidden * 2048 + 2 * 2048
