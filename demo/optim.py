# SPDX-License-Identifier: Apache-2.0
"""What both phases share: optimisers, learning-rate schedule, progress lines, resumable state."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SAVE_EVERY_S = 120.0


def schedule(step: int, steps: int, warmup: int = 100, decay: float = 0.35) -> float:
    """Share of the full learning rate: linear rise, constant, linear fall over the last `decay` of it."""
    rise = (step + 1) / warmup
    fall = (steps - step) / max(1.0, decay * steps)
    return max(0.02, min(1.0, rise, fall))


class Optimiser:
    """Muon (Jordan et al. 2024) for the matrices inside the layers and AdamW for everything else."""

    def __init__(
        self, hidden: Iterable[nn.Module], everything: Iterable[nn.Module], lr: float, decay: float
    ) -> None:
        matrices = [p for module in hidden for p in module.parameters() if p.ndim == 2]
        taken = {id(p) for p in matrices}
        others = list({id(p): p for module in everything for p in module.parameters()}.values())
        self.parameters = others
        self.lr = lr
        self.parts = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [p for p in others if id(p) not in taken], lr=lr, weight_decay=decay, betas=(0.9, 0.98)
            ),
        )

    def step(self, loss: Tensor, share: float) -> None:
        """One update with `share` of the learning rate, gradients clipped to norm 1."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)
            for group in part.param_groups:
                group["lr"] = self.lr * share
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            part.step()  # type: ignore[no-untyped-call]

    def state_dict(self) -> list[Any]:
        """State of both optimisers."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, state: list[Any]) -> None:
        """Restore what `state_dict` returned."""
        for part, saved in zip(self.parts, state, strict=True):
            part.load_state_dict(saved)


class Log:
    """Progress as one JSON object a line, on the screen and in `log.jsonl`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        self.start = time.monotonic()

    def __call__(self, **fields: Any) -> None:
        """Write one line; floats are rounded to four digits."""
        fields = {
            key: round(value, 4) if isinstance(value, float) else value for key, value in fields.items()
        }
        line = json.dumps({"seconds": round(time.monotonic() - self.start), **fields})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a state file so that a kill leaves the old one or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any] | None:
    """Read a state file, or None where there is none yet."""
    return torch.load(path, weights_only=True) if path.exists() else None
