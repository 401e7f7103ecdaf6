# SPDX-License-Identifier: Apache-2.0
"""Train the demo model and export it: `python -m demo.train --out DIR`.

Phase 1 pretrains the CLIP tower alone, phase 2 freezes it and trains projector and language model, then the
best weights by validation accuracy are exported to `DIR/export` and measured on the test split
(`DIR/report.json`). Every phase saves its state each two minutes: run the same command again to go on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from demo.accuracy import measure
from demo.curve import before_the_cut, describe_knee, similarity
from demo.export import export
from demo.language import Features, LanguageSettings, train_language
from demo.model import Size, build
from demo.optim import Log, load
from demo.tower import TowerSettings, pretrain
from vtprune_eval.scenes import BASE_SIZE, Scene


def report(folder: Path, size: Size, count: int, log: Log, device: torch.device) -> dict[str, object]:
    """Accuracy of `folder`/best.pt on the first `count` test pictures, and the scenes' CLS curve."""
    model = build(size)
    state = load(folder / "best.pt")
    if state is None:
        raise FileNotFoundError(f"{folder / 'best.pt'} is missing: train first.")
    model.load_state_dict(state["model"])
    model.to(device).eval()  # type: ignore[arg-type]
    data = Features.room_for(model.model.vision_tower, "test", count, size).grow(count)
    everything = measure(model, data.scenes, data.states)
    scenes = [number for number, drawn in enumerate(data.scenes) if isinstance(drawn, Scene)]
    shown = [drawn for drawn in data.scenes if isinstance(drawn, Scene)]
    return {
        "pictures": count,
        **everything.as_dict(),
        "knee": describe_knee(shown, data.states[scenes]).as_dict(),
        "pruned": {f"a={a}": _pruned(model, data, a) for a in (0.3, 0.5, 0.7)},
    }


def _pruned(model: LlavaForConditionalGeneration, data: Features, aggressiveness: float) -> dict[str, float]:
    """Accuracy with the patches before the cut, and with as many random ones per picture."""
    kept = [before_the_cut(scores, aggressiveness) for scores in similarity(data.states)]
    generator = torch.Generator().manual_seed(0)
    total = data.states.shape[1] - 1
    chance = [torch.randperm(total, generator=generator)[: len(indices)].sort().values for indices in kept]
    return {
        "share_kept": sum(map(len, kept)) / (total * len(kept)),
        "inflection": measure(model, data.scenes, data.states, lambda number, _: kept[number]).overall,
        "random": measure(model, data.scenes, data.states, lambda number, _: chance[number]).overall,
    }


def main() -> None:
    """Parse the command line and run what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for state, log, report and export")
    parser.add_argument(
        "--image-size", type=int, default=BASE_SIZE, help="168 (144 patches) or 336 (576 patches)"
    )
    parser.add_argument("--tower-steps", type=int, default=TowerSettings.steps)
    parser.add_argument("--language-steps", type=int, default=LanguageSettings.steps)
    parser.add_argument("--language-scenes", type=int, default=LanguageSettings.scenes)
    parser.add_argument("--test-scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the export"
    )
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    size, device, log = Size(image=options.image_size), torch.device(options.device), Log(options.out)
    model = build(size).to(device)  # type: ignore[arg-type]
    tower = replace(TowerSettings(), steps=options.tower_steps)
    language = replace(LanguageSettings(), steps=options.language_steps, scenes=options.language_scenes)
    log(
        phase="settings", size=asdict(size), tower=asdict(tower), language=asdict(language), seed=options.seed
    )
    pretrain(model.model.vision_tower, size, tower, options.out, options.seed, log)
    train_language(model, size, language, options.out, options.seed, log)

    result = report(options.out, size, options.test_scenes, log, device)
    (options.out / "report.json").write_text(json.dumps(result, indent=1))
    log(phase="report", **result)
    best = load(options.out / "best.pt")
    if best is not None:
        model.load_state_dict(best["model"])
    export(model, size, options.out / "export", getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
