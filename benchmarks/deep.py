# SPDX-License-Identifier: Apache-2.0
"""The demo model's answers at a large decoder's cost.

Layers are added that hand on what they are given: their attention's output projection and their MLP's down
projection are zero, so that what they add to the residual stream is zero, and everything before those is
computed on random weights. The residual stream and the MLPs are made wider; the demo's own weights fill
theirs with zeros, and its norms, which now divide by the root of a mean over m times as many places, by as
much less. So a trained model, whose answers can be graded, costs like one that is large enough to measure.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

_LAYERS = "language_model.model.layers."
_SPREAD = 0.02
#: Ends of the names of weights to which of their axes are as long as the residual stream (h), an MLP (i).
_AXES = {
    "embed_tokens.weight": "-h",
    "lm_head.weight": "-h",
    "multi_modal_projector.linear_1.weight": "h-",
    "multi_modal_projector.linear_1.bias": "h",
    "multi_modal_projector.linear_2.weight": "hh",
    "multi_modal_projector.linear_2.bias": "h",
    "q_proj.weight": "-h",
    "k_proj.weight": "-h",
    "v_proj.weight": "-h",
    "o_proj.weight": "h-",
    "gate_proj.weight": "ih",
    "up_proj.weight": "ih",
    "down_proj.weight": "hi",
    "norm.weight": "h",
}


@dataclass(frozen=True)
class Deepening:
    """What is added to a decoder.

    Attributes:
        before: layers that hand on, ahead of its first.
        after: the same behind its last.
        hidden: width of the residual stream.
        intermediate: of every layer's MLP, the model's own included.
    """

    before: int
    after: int
    hidden: int
    intermediate: int


def deepen(source: Path, folder: Path, added: Deepening, seed: int = 0) -> None:
    """Write a LLaVA that answers as the one in `source`, float32 in one file, with the same processor.

    Args:
        source: a LLaVA with a Llama decoder.
        folder: where to.
        added: see `Deepening`.
        seed: of the random weights.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    own_layers, times_wider = text["num_hidden_layers"], added.hidden / text["hidden_size"]
    text |= {
        "num_hidden_layers": added.before + own_layers + added.after,
        "hidden_size": added.hidden,
        "intermediate_size": added.intermediate,
        # of a mean of squares that is as much smaller
        "rms_norm_eps": text["rms_norm_eps"] / times_wider,
    }
    weights: dict[str, Tensor] = {}
    layers: list[dict[str, Tensor]] = [{} for _ in range(own_layers)]
    for name, weight in load_file(source / "model.safetensors").items():
        if name.startswith("vision_tower."):
            weights[name] = weight
            continue
        wide = _padded(name, weight, added)
        if name.endswith("norm.weight"):
            wide /= math.sqrt(times_wider)
        if name.startswith(_LAYERS):
            number, _, part = name.removeprefix(_LAYERS).partition(".")
            layers[int(number)][part] = wide
        else:
            weights[name] = wide
    generator = torch.Generator().manual_seed(seed)
    for at in range(text["num_hidden_layers"]):
        own = at - added.before
        layer = layers[own] if 0 <= own < own_layers else _handing_on(layers[0], generator)
        weights |= {f"{_LAYERS}{at}.{part}": weight for part, weight in layer.items()}
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _padded(name: str, weight: Tensor, added: Deepening) -> Tensor:
    """A weight at the decoder's new widths, zeros where there was nothing."""
    axes = next(axes for end, axes in _AXES.items() if name.endswith(end))
    wanted = {"h": added.hidden, "i": added.intermediate}
    shape = [wanted.get(axis, length) for axis, length in zip(axes, weight.shape, strict=True)]
    wide = weight.new_zeros(shape)
    wide[tuple(map(slice, weight.shape))] = weight
    return wide


def _handing_on(like: dict[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    """A layer of the same shapes whose two branches end in zero."""
    import torch

    made = {}
    for part, weight in like.items():
        if part in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
            made[part] = torch.zeros_like(weight)
        elif weight.ndim == 1:
            made[part] = torch.ones_like(weight)
        else:
            made[part] = torch.empty_like(weight).normal_(0, _SPREAD, generator=generator)
    return made
