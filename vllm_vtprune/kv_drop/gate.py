# SPDX-License-Identifier: Apache-2.0
"""DyVTE's gate (arXiv 2411.19628): a small trained network that lets all visual tokens of a prompt leave.

At one prune layer it reads the prompt's text behind its pictures and says whether the answer would survive
the exit. The paper has a gate behind every layer; here one stands at a prune layer, where the KV cache can
change. `vtprune calibrate --gate` trains it and writes the file. Nothing here knows of vLLM.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_vtprune.kv_drop.schedule import ScheduleError

#: The paper's.
WIDTH = 2048
_BELOW, _ABOVE = "below.weight", "above.weight"
_FORMAT = "vtprune gate 1"


@dataclass(frozen=True)
class GateFacts:
    """What a gate is for.

    Attributes:
        layer: K of the prune layer at which it decides.
        layers: decoder layers of its model.
        hidden: width of its model's hidden states.
        weights: fingerprint of its model (`vllm_vtprune.fingerprint`).
    """

    layer: int
    layers: int
    hidden: int
    weights: str


class Gate(nn.Module):
    """Two linear layers without bias around a GELU, as the paper's; in float32 whatever the model is in.

    The weights are buffers: no checkpoint of the model has them, and of a model's memory vLLM's sleep mode
    saves its buffers alone (`vllm.v1.worker.gpu_worker.Worker.sleep`).
    """

    below: Tensor
    above: Tensor

    def __init__(self, below: Tensor, above: Tensor) -> None:
        """From weights [WIDTH, 2 * hidden] and [2, WIDTH], which it takes as float32."""
        super().__init__()
        with torch.inference_mode(False):
            self.register_buffer("below", below.float().clone(), persistent=False)
            self.register_buffer("above", above.float().clone(), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """Logits of staying and of leaving, [P, 2], from `text_states` of P prompts, [P, 2 * hidden]."""
        return nn.functional.gelu(states @ self.below.T) @ self.above.T


def text_states(text: Tensor) -> Tensor:
    """What a gate reads of a prompt.

    The mean hidden state of the text behind the pictures without its last token, and that of the last.

    Args:
        text: hidden states of that text, [n, hidden], n at least 1.

    Returns:
        [2 * hidden] in float32.
    """
    text = text.float()
    behind = text[:-1] if len(text) > 1 else text
    return torch.cat([behind.mean(0), text[-1]])


def leaves(logits: Tensor) -> Tensor:
    """Where the visual tokens leave, bool [P], from a gate's logits, [P, 2]; a tie lets them stay."""
    return logits[:, 1] > logits[:, 0]


def save(
    path: Path,
    gate: Gate,
    facts: GateFacts,
    notes: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a gate.

    Args:
        path: of the safetensors file.
        gate: the gate.
        facts: what it is for.
        notes: how it was trained and judged, as JSON values.
        dtype: of the weights in the file.
    """
    weights = {_BELOW: gate.below.to(dtype).contiguous(), _ABOVE: gate.above.to(dtype).contiguous()}
    metadata = {
        "format": _FORMAT,
        "layer": str(facts.layer),
        "layers": str(facts.layers),
        "weights": facts.weights,
        "notes": json.dumps(notes, sort_keys=True),
    }
    save_file(weights, str(path), metadata=metadata)


def read_facts(path: str | Path) -> GateFacts:
    """What the gate in a file is for.

    Raises:
        ScheduleError: it cannot be read.
    """
    return _open(path)[0]


def load(path: str | Path) -> Gate:
    """The gate in a file.

    Raises:
        ScheduleError: it cannot be read.
    """
    return Gate(*_open(path)[1])


def _open(path: str | Path) -> tuple[GateFacts, Sequence[Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ScheduleError(f"{path} is no gate, as `vtprune calibrate --gate` writes")
            below, above = file.get_tensor(_BELOW), file.get_tensor(_ABOVE)
        if below.shape[0] != above.shape[1] or above.shape[0] != 2 or below.shape[1] % 2:
            raise ScheduleError(f"{path} holds matrices that are no gate's: train it again")
        facts = GateFacts(
            int(metadata["layer"]), int(metadata["layers"]), below.shape[1] // 2, metadata["weights"]
        )
        return facts, (below, above)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, ScheduleError):
            raise
        raise ScheduleError(f"{path} cannot be read as a gate: {error}") from error
