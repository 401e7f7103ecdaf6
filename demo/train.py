# SPDX-License-Identifier: Apache-2.0
"""Train the demo model and export it: `python -m demo.train --out DIR`.

Phase 1 pretrains the CLIP tower alone, phase 2 freezes it and trains projector and language model, then the
best weights by validation accuracy are exported to `DIR/export` and measured on the test split as `vtprune
eval DIR/export` does (`DIR/report.json`). Every phase saves its state each two minutes: run the same command
again to go on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from demo.export import export
from demo.language import LanguageSettings, train_language
from demo.model import Size, build
from demo.optim import Log, load
from demo.tower import TowerSettings, pretrain
from vllm_vtprune.settings import VisionSettings
from vtprune_eval.drawn import DOMAINS
from vtprune_eval.measure import evaluate
from vtprune_eval.scenes import BASE_SIZE
from vtprune_eval.setting import Setting
from vtprune_eval.tasks import drawn_questions
from vtprune_eval.transformers_backend import LocalModel, LocalRunner


def report(folder: Path, scenes: int, device: str) -> dict[str, object]:
    """What the exported model in `folder` answers on the test split, unpruned and pruned to three depths.

    By domain: the drawn scenes, and the pages.
    """
    settings = [Setting(VisionSettings(aggressiveness=a)) for a in (0.3, 0.5, 0.7)]
    model = LocalModel(str(folder), device)
    result: dict[str, object] = {}
    for domain in DOMAINS:
        questions = drawn_questions("test", scenes, model.image_size, domain)
        runner = LocalRunner(model, questions, frozenset())
        result[domain] = evaluate(runner, settings, print, ("random",))
    return result


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

    best = load(options.out / "best.pt")
    if best is None:
        raise FileNotFoundError(f"{options.out / 'best.pt'} is missing: more --language-steps make one.")
    model.load_state_dict(best["model"])
    export(model, size, options.out / "export", getattr(torch, options.dtype))
    result = report(options.out / "export", options.test_scenes, options.device)
    (options.out / "report.json").write_text(json.dumps(result, indent=1))
    log(phase="report", **result)


if __name__ == "__main__":
    main()
