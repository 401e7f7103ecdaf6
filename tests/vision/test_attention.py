# SPDX-License-Identifier: Apache-2.0
"""The attention that patches receive, read in parts, beside the whole matrix."""

from __future__ import annotations

import torch

from vllm_vtprune.vision.attention import received_attention


def test_it_is_the_whole_matrix_s_mean_and_no_company_changes_it() -> None:
    """Six images of 700 patches, more than one part of a CPU's for each."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(6, 4, 700, 16, generator=generator) for _ in range(2))
    received = received_attention(query, key, 0.25)
    whole = (query.double() @ key.double().transpose(-1, -2) * 0.25).softmax(-1).mean((1, 2))
    torch.testing.assert_close(received.double(), whole, atol=1e-8, rtol=1e-5)
    alone = [received_attention(query[i : i + 1], key[i : i + 1], 0.25) for i in range(6)]
    assert torch.equal(received, torch.cat(alone))
