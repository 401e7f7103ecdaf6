# SPDX-License-Identifier: Apache-2.0
"""The attention that patches receive, read in parts, beside the whole matrix."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from vllm_vtprune.families.base import OPTIONAL_OUTPUTS
from vllm_vtprune.vision.attention import READABLE, read_layers, reading, received_attention


def test_it_is_the_whole_matrix_s_mean_and_no_company_changes_it() -> None:
    """Six images of 700 patches, more than one part of a CPU's for each."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(6, 4, 700, 16, generator=generator) for _ in range(2))
    received = received_attention(query, key, 0.25)
    whole = (query.double() @ key.double().transpose(-1, -2) * 0.25).softmax(-1).mean((1, 2))
    torch.testing.assert_close(received.double(), whole, atol=1e-8, rtol=1e-5)
    alone = [received_attention(query[i : i + 1], key[i : i + 1], 0.25) for i in range(6)]
    assert torch.equal(received, torch.cat(alone))


@pytest.mark.parametrize(
    "depth,readable,received,midway",
    [
        (24, (), 23, 8),  # HiPrune's ninth of CLIP ViT-L's 24
        (32, (7, 15, 23, 31), 31, 15),  # Qwen2.5-VL-7B: both the 8th and the 16th are four away
        (27, (), 26, 9),
        (2, (), 1, 0),
        (1, (), 0, 0),
    ],
)
def test_attention_is_read_in_the_last_layer_and_near_nine_twenty_fourths_of_the_depth(
    depth: int, readable: tuple[int, ...], received: int, midway: int
) -> None:
    assert read_layers(OPTIONAL_OUTPUTS, depth, readable) == {"received": received, "received_midway": midway}
    assert read_layers(frozenset({"received", "keys"}), depth, readable) == {"received": received}


def test_one_module_may_be_read_under_two_names() -> None:
    module, states = torch.nn.Identity(), torch.randn(1, 2, 5, 4)

    def attend() -> None:
        attention = AttentionInterface()[READABLE]
        attention(module, states, states, states, None, scaling=0.5, is_causal=False)

    with reading({"received": module, "received_midway": module}) as seen:
        attend()
    attend()
    expected = received_attention(states, states, 0.5)
    for name in ("received", "received_midway"):
        (one,) = seen[name]
        assert torch.equal(one, expected)
