# SPDX-License-Identifier: Apache-2.0
"""Vision tokens of one photograph before and after pruning, in each family: the table of docs/models.md.

    python -m benchmarks.family_tokens [PICTURE]      # by default a photograph that comes with matplotlib

The checkpoints have random weights, and the tiles, patches and pixel limits of the published models, which
decide the counts. Of which tokens stay random weights say nothing: for the presets the table has the most
that they keep. Needs a checkout, whose tests build the checkpoints.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from vllm_vtprune import request_kwargs
from vllm_vtprune.contract import PRESETS
from vtprune_loadtest.command import command

_SHARE = 0.22


def main(argv: list[str] | None = None) -> int:
    """Print the table; gives the exit status."""
    prog = "python -m benchmarks.family_tokens"
    return command(prog, lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(arguments: list[str]) -> None:
    from matplotlib import cbook

    photograph: Any = arguments[0] if arguments else cbook.get_sample_data("grace_hopper.jpg")
    image = Image.open(photograph).convert("RGB")
    presets = [name for name, preset in PRESETS.items() if preset.max_share < 1]
    print(f"{image.width}x{image.height} pixels\n")
    most = " | ".join(f"`{name}`, at most" for name in presets)
    print(f"| models | unpruned | {most} | `keep_ratio` {_SHARE} |")
    print("|---" * (3 + len(presets)) + "|")
    shares = [*(PRESETS[name].max_share for name in presets), _SHARE]
    for models, before, after in rows(image, shares):
        print(f"| {models} | {before:,} | " + " | ".join(f"{kept:,}" for kept in after) + " |", flush=True)


def rows(image: Image.Image, shares: list[float]) -> Iterator[tuple[str, int, list[int]]]:
    """Per family its models, the picture's vision tokens, and those kept at each share."""
    from tests.helpers.family_processor import processor_of

    for models, build in checkpoints().items():
        with tempfile.TemporaryDirectory() as folder:
            processor = processor_of(build(Path(folder) / "checkpoint"))
            found = [counts(processor, image, share) for share in shares]
        yield models, found[0][0], [kept for _, kept in found]


def counts(processor: Any, image: Image.Image, keep_ratio: float) -> tuple[int, int]:
    """Vision tokens of a picture before and after pruning."""
    from tests.helpers.family_processor import placeholder_of

    kwargs, _ = request_kwargs(keep_ratio=keep_ratio)
    items = processor.info.parse_mm_data({"image": [image]})
    result = processor(placeholder_of(processor), items, hf_processor_mm_kwargs=kwargs)
    (place,) = result["mm_placeholders"]["image"]
    return result["vtprune_vision_tokens"], place.get_num_embeds()


def checkpoints() -> dict[str, Callable[[Path], Path]]:
    """Models -> what writes a checkpoint of their geometry."""
    from benchmarks.llava import DecoderShape, TowerShape, random_llava
    from tests.helpers import family_checkpoints

    def llava(folder: Path) -> Path:
        decoder = DecoderShape(hidden=64, intermediate=96, layers=2, heads=2, vocab=300)
        random_llava(folder, decoder, TowerShape(hidden=32, intermediate=64, layers=3, heads=2))
        return folder

    def published(name: str) -> Callable[[Path], Path]:
        return lambda folder: family_checkpoints.CHECKPOINTS[name](folder, published=True)

    return {
        "LLaVA-1.5": llava,
        "LLaVA-NeXT": published("llava_next"),
        "LLaVA-OneVision": published("llava_onevision"),
        "Qwen2.5-VL": published("qwen2_5_vl"),
        "Qwen3-VL, Qwen3.5 and 3.6": published("qwen3_vl"),
        "InternVL 3 and 3.5": published("internvl"),
        "Mistral-Small 3.x": published("mistral3"),
    }


if __name__ == "__main__":
    sys.exit(main())
