# SPDX-License-Identifier: Apache-2.0
"""The demo model's answers at a large decoder's cost.

Layers are added that hand on what they are given: their attention's output projection and their MLP's down
projection are zero, so that what they add to the residual stream is zero, and everything before those is
computed on random weights. The intermediate size of all layers is raised; the demo's own layers fill it with
zeros. So a trained model, whose answers can be graded, costs like one that is large enough to measure.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

_LAYERS = "language_model.model.layers."
_SPREAD = 0.02


@dataclass(frozen=True)
class Deepening:
    """What is added to a decoder.

    Attributes:
        before: layers that hand on, ahead of its first.
        after: the same behind its last.
        intermediate: of every layer's MLP, the model's own included.
    """

    before: int
    after: int
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
    own_layers, own_width = text["num_hidden_layers"], text["intermediate_size"]
    text |= {
        "num_hidden_layers": added.before + own_layers + added.after,
        "intermediate_size": added.intermediate,
    }
    weights: dict[str, Tensor] = {}
    layers: list[dict[str, Tensor]] = [{} for _ in range(own_layers)]
    for name, weight in load_file(source / "model.safetensors").items():
        if name.startswith(_LAYERS):
            number, _, part = name.removeprefix(_LAYERS).partition(".")
            layers[int(number)][part] = _padded(part, weight, added.intermediate - own_width)
        else:
            weights[name] = weight
    generator = torch.Generator().manual_seed(seed)
    for number in range(text["num_hidden_layers"]):
        own = number - added.before
        layer = layers[own] if 0 <= own < own_layers else _handing_on(layers[0], generator)
        weights |= {f"{_LAYERS}{number}.{part}": weight for part, weight in layer.items()}
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            shutil.copy(path, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _padded(part: str, weight: Tensor, more: int) -> Tensor:
    """A weight of a layer whose MLP is `more` wider."""
    from torch.nn.functional import pad

    if part in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        return pad(weight, (0, 0, 0, more))
    return pad(weight, (0, more)).contiguous() if part == "mlp.down_proj.weight" else weight


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
