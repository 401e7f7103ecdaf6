# SPDX-License-Identifier: Apache-2.0
"""The embedded demo models: where they lie and how they are served and asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
#: Of its five layers the first two rate tokens badly (docs/evaluation/results.md).
PRUNE_LAYER = 3
#: A picture it knows, and what it is asked about that.
EXAMPLE = FOLDER / "example.png"
QUESTION = "What color is the circle?"


@dataclass(frozen=True)
class DemoModel:
    """A small trained model that comes with the package; demo/MODEL_CARD.md describes them.

    Attributes:
        folder: of its checkpoint.
        served_name: the model's name in the API.
        prune_layer: what it is served with.
        videos: whether its vocabulary can frame a video.
    """

    folder: Path
    served_name: str
    prune_layer: int
    videos: bool = True


LLAVA = DemoModel(FOLDER, "vtprune-demo", PRUNE_LAYER)
QWEN3_VL = DemoModel(FOLDER.parent / "demo_qwen3_vl", "vtprune-demo-qwen3-vl", 3, videos=False)
#: What `vtprune serve` may be given for a model.
NAMES = {"demo": LLAVA, "demo-qwen3-vl": QWEN3_VL}


def embedded(model: str) -> DemoModel | None:
    """The demo model that lies in the folder `model`; None if that is another's."""
    return next((demo for demo in NAMES.values() if str(demo.folder) == model), None)
