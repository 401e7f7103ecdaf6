# SPDX-License-Identifier: Apache-2.0
"""One row of an evaluation: how the pictures' tokens and the prompt's tokens are pruned."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_vtprune.contract import PRESETS
from vllm_vtprune.kv_drop.schedule import PruneLayer
from vllm_vtprune.selection import DEFAULT_METHOD
from vllm_vtprune.settings import KVSettings, VisionSettings

#: Not a selection method but the picture itself made smaller, to about as many tokens.
DOWNSCALE = "downscale"
#: The rules that every method is compared with at its own counts.
BASELINES = ("random", "uniform", DOWNSCALE)
#: Of a request that takes whatever schedule it meets.
AS_SCHEDULED = KVSettings(math.nextafter(1.0, 0.0))


@dataclass(frozen=True)
class Setting:
    """How one run prunes.

    Attributes:
        vision: stage 1.
        kv: stage 2's keep share and scope.
        prune_layer: K of stage 2. None leaves it to a server's operator; the transformers runner needs it,
            or a schedule, where `kv` drops anything.
        window: last prompt tokens that rate the others and stay.
        relevance: how stage 2 rates tokens: a name of `borders.RATINGS`, or one for each prune layer,
            separated by commas.
        like: of a baseline, the stage 1 whose count it keeps, picture by picture.
        draw: of `random`, which of several draws.
        schedule: several prune layers in the place of `prune_layer`; `AS_SCHEDULED` takes it as it is.
    """

    vision: VisionSettings = field(default_factory=VisionSettings)
    kv: KVSettings = field(default_factory=KVSettings)
    prune_layer: int | None = None
    window: int = 8
    relevance: str = "attention"
    like: VisionSettings | None = None
    draw: int = 0
    schedule: tuple[PruneLayer, ...] = ()

    @staticmethod
    def preset(name: str, prune_layer: int | None = None) -> Setting:
        """What the preset of that name asks for.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        preset = PRESETS[name]
        return Setting(
            VisionSettings(aggressiveness=preset.aggressiveness, max_share=preset.max_share),
            KVSettings(preset.kv_keep),
            prune_layer,
        )

    def baseline(self, name: str, draw: int = 0) -> Setting:
        """The same counts and the same stage 2, the tokens chosen by a baseline."""
        return replace(self, vision=replace(self.vision, method=name), like=self.counted, draw=draw)

    @property
    def counted(self) -> VisionSettings:
        """The stage 1 that says how many tokens of each picture stay."""
        if self.like is not None:
            return self.like
        return replace(self.vision, method=DEFAULT_METHOD) if self.downscales else self.vision

    @property
    def downscales(self) -> bool:
        """Whether the picture is made smaller instead of being pruned."""
        return self.vision.method == DOWNSCALE and not self.vision.keeps_all

    @property
    def prune_layers(self) -> tuple[PruneLayer, ...]:
        """The prune layers, from the lowest up; empty where a server's operator knows them."""
        alone = () if self.prune_layer is None else (PruneLayer(self.prune_layer),)
        return self.schedule or alone

    @property
    def relevances(self) -> tuple[str, ...]:
        """The rating at each prune layer; the last holds for the rest."""
        return tuple(self.relevance.split(","))

    @property
    def prunes(self) -> bool:
        """Whether anything may be dropped."""
        return not self.vision.keeps_all or self.kv.drops

    @property
    def label(self) -> str:
        """One line that tells this setting from others."""
        parts = []
        if not self.vision.keeps_all:
            amount = (
                f"keep_ratio={self.vision.keep_ratio:g}"
                if self.vision.keep_ratio is not None
                else f"aggressiveness={self.vision.aggressiveness:g}"
            )
            parts = [self.vision.method, amount]
            parts += [self.vision.score] if self.vision.score != "cosine" else []
            parts += [f"max_share={self.vision.max_share:g}"] if self.vision.max_share < 1 else []
        if self.kv.drops:
            scheduled = bool(self.schedule) and self.kv == AS_SCHEDULED
            parts += [] if scheduled else [f"kv_keep={_written(self.kv)}", f"scope={self.kv.scope}"]
            if self.schedule:
                text = ",".join(map(str, self.schedule))
                parts += [text, f"window={self.window}", self.relevance]
            elif self.prune_layer is not None:
                parts += [f"K={self.prune_layer}", f"window={self.window}", self.relevance]
        return " ".join(parts) or "unpruned"

    def as_dict(self) -> dict[str, Any]:
        """The contract's names and the operator's, for JSON."""
        return {
            "method": self.vision.method,
            "aggressiveness": self.vision.aggressiveness,
            "keep_ratio": self.vision.keep_ratio,
            "score": self.vision.score,
            "max_share": self.vision.max_share,
            "kv_keep": list(self.kv.shares) if self.kv.above else self.kv.keep,
            "kv_scope": self.kv.scope,
            "prune_layer": self.prune_layer if self.kv.drops else None,
            "schedule": ",".join(map(str, self.schedule)) if self.kv.drops and self.schedule else None,
            "window": self.window if self.kv.drops else None,
            "relevance": self.relevance if self.kv.drops else None,
        }


def _written(kv: KVSettings) -> str:
    return ",".join(f"{share:g}" for share in kv.shares)
