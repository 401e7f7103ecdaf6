# SPDX-License-Identifier: Apache-2.0
"""A gate for a random checkpoint that lets about half of some requests' visual tokens leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tests.reference import PruneLayer, Reference, Request
from vllm_vtprune.fingerprint import fingerprint
from vllm_vtprune.kv_drop.gate import Gate, GateFacts, save

#: Beside the checkpoint's files, which all end otherwise.
FILE = "exit.gate"


def linear_gate(direction: torch.Tensor) -> Gate:
    """A gate that lets tokens leave where its input lies in a direction: GELU(x) - GELU(-x) = x."""
    return Gate(torch.stack([direction, -direction]), torch.tensor([[0.0, 0.0], [1.0, -1.0]]))


def halving_gate(states: torch.Tensor) -> Gate:
    """A gate that lets tokens leave for half of some states, [n, 2 * hidden], by what sets them apart."""
    mean = states.mean(0)
    direction = torch.linalg.svd(states - mean, full_matrices=False).Vh[0]
    # it has no threshold of its own: half way between the two in the middle, by what all have in common
    low, high = (states @ direction).sort().values[len(states) // 2 - 1 : len(states) // 2 + 1]
    direction = direction - mean * (low + high) / 2 / (mean @ mean)
    return linear_gate(4 * direction / (states @ direction).abs().max())


def write_gate(
    checkpoint: Path,
    prune_layers: int | tuple[PruneLayer, ...],
    relevance: str | tuple[str, ...],
    layer: int,
    requests: Sequence[Request],
) -> Path:
    """Write a gate at a layer that halves the requests."""
    reference = Reference(checkpoint, prune_layers, relevance=relevance)
    states = torch.stack([reference.gate_states(request, layer) for request in requests])
    config = reference.model.config.text_config
    facts = GateFacts(layer, config.num_hidden_layers, config.hidden_size, fingerprint(str(checkpoint)))
    path = checkpoint / FILE
    save(path, halving_gate(states), facts, {}, torch.float32)
    return path
