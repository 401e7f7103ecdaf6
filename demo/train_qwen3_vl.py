# SPDX-License-Identifier: Apache-2.0
"""Train a small Qwen3-VL on the demo's pictures and export it: `python -m demo.train_qwen3_vl --out DIR`.

Phase 1 teaches the tower's patches to name what they show, phase 2 trains all of it on answers, with units
left out at random as the demo model's patches are. Both resolutions take turns. Every phase saves its state
each two minutes: run the same command again to go on. The best weights by validation accuracy are exported to
`DIR/export`; serve them with `vtprune serve DIR/export`.

No such model has been trained yet: what is tested is that each step computes what it should.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from demo.accuracy import Accuracy
from demo.data import collate
from demo.language import LanguageSettings, keep_some, patch_words, start_on_matches, word_loss
from demo.model import IGNORE
from demo.optim import SAVE_EVERY_S, Log, Optimiser, load, save, schedule
from demo.qwen3_vl import SIDES, Seen, Shape, answer_logits, build, export, pack_questions, see, unit_patches
from demo.tower import Heads
from vtprune_eval.drawn import Drawn, draw, questions_each, questions_many
from vtprune_eval.scenes import PATCH

_LANGUAGE = LanguageSettings()


@dataclass(frozen=True)
class Settings:
    """Length and rates; those of the demo model where it has the same phase."""

    tower_steps: int = 2400
    steps: int = 9000
    align_steps: int = 300
    batch: int = 8
    tower_batch: int = 16
    validation_scenes: int = 100
    lr: float = 2e-3
    weight_decay: float = 0.02


class Trainer:
    """The model, its patch heads, their optimisers and their state file `folder`/state.pt."""

    def __init__(self, shape: Shape, settings: Settings, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.settings, self.seed, self.path, self.step = settings, seed, folder / "state.pt", 0
        self.model: Any = build(shape)
        start_on_matches(cast(Any, self.model))
        self.heads = Heads(shape.tower_width)
        visual, language = self.model.model.visual, self.model.model.language_model
        rate = (settings.lr, settings.weight_decay)
        self.tower = Optimiser([visual.blocks], [visual, self.heads], *rate)
        self.whole = Optimiser([visual.blocks, language.layers], [self.model, self.heads], *rate)
        self.best = 0.0
        self.parts: dict[str, Any] = {
            "model": self.model,
            "heads": self.heads,
            "tower": self.tower,
            "whole": self.whole,
        }
        if (state := load(self.path)) is not None:
            self.step, self.best = state.pop("step"), state.pop("best")
            for name, saved in state.items():
                self.parts[name].load_state_dict(saved)

    def save(self) -> None:
        """Write the state file."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save(self.path, {"step": self.step, "best": self.best, **parts})

    def train_step(self) -> dict[str, float]:
        """One update on pictures never seen before, of this step's resolution."""
        settings = self.settings
        pretraining = self.step < settings.tower_steps
        count = settings.tower_batch if pretraining else settings.batch
        # enough for either phase, and no picture twice
        first = self.step * max(settings.tower_batch, settings.batch)
        scenes = [draw("train", first + k, SIDES[self.step % len(SIDES)]) for k in range(count)]
        rng = random.Random(f"{self.seed} {self.step}")
        self.step += 1
        seen, order = self._see(scenes)
        labels = collate(scenes).labels[:, order.flatten()]
        named, right = self.heads.name_patches(seen.patches, labels)
        if pretraining:
            self.tower.step(named, schedule(self.step, settings.tower_steps))
            return {"patches": named.item(), **{name: value.item() for name, value in right.items()}}
        keep = keep_some(shown_units(scenes, order), _LANGUAGE.least_share, rng)
        words = word_loss(
            seen.units.flatten(0, 1),
            unit_words(scenes, order).flatten(0, 1),
            self.model.model.language_model.embed_tokens.weight,
        )
        done = self.step - settings.tower_steps
        if done <= settings.align_steps:
            self.whole.step(words + named, schedule(done, settings.align_steps, warmup=20))
            return {"words": words.item(), "patches": named.item()}
        questions = [questions_many(scene, _LANGUAGE.questions, rng, _LANGUAGE.kinds) for scene in scenes]
        ascending = _ascending(keep)
        packed = pack_questions(questions, ascending)
        logits = answer_logits(self.model, seen, ascending, packed)
        answer = F.cross_entropy(logits, packed.targets)
        share = schedule(done - settings.align_steps, settings.steps - settings.align_steps, warmup=40)
        self.whole.step(answer + 0.2 * words + 0.2 * named, share)
        asked = packed.first
        answered = (logits[asked].argmax(-1) == packed.targets[asked]).float().mean()
        return {"loss": answer.item(), "words": words.item(), "right": answered.item()}

    def _see(self, scenes: list[Drawn]) -> tuple[Seen, Tensor]:
        pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
        return see(self.model, pixels), unit_patches(pixels.shape[1] // PATCH)

    @torch.inference_mode()
    def validate(self, objects_alone: bool) -> Accuracy:
        """One question of every kind about each picture: its word and the end after it must be right."""
        accuracy = Accuracy()
        for number in range(self.settings.validation_scenes):
            scene = draw("validation", number, SIDES[number % len(SIDES)])
            seen, order = self._see([scene])
            shown = shown_units([scene], order)
            keep = torch.arange(shown.shape[1])[None]
            if objects_alone and bool(shown.any()):
                keep = shown[0].nonzero().T
            questions = questions_each(scene, random.Random(f"0 {number}"))
            packed = pack_questions([questions], keep)
            right = answer_logits(self.model, seen, keep, packed).argmax(-1) == packed.targets
            for question, correct in zip(questions, right.view(-1, 2).all(1).tolist(), strict=True):
                accuracy.count(question.kind, correct)
        return accuracy


def shown_units(scenes: list[Drawn], order: Tensor) -> Tensor:
    """Which units show an object, bool [B, N]: those of which a patch does."""
    patches = torch.from_numpy(np.stack([scene.object_patches.reshape(-1) for scene in scenes]))
    return patches[:, order].any(-1)


def unit_words(scenes: list[Drawn], order: Tensor) -> Tensor:
    """The words that each unit shows, [B, N, 4]: those of its patch that shows most of an object."""
    prominence = torch.from_numpy(np.stack([scene.prominence.reshape(-1) for scene in scenes]))[:, order]
    words = patch_words(scenes)[:, order]  # [B, N, 4 patches, 4 words]
    known = (words != IGNORE).any(-1)
    best = prominence.masked_fill(~known, -1).argmax(-1)
    return words.gather(2, best[..., None, None].expand(-1, -1, 1, words.shape[-1]))[:, :, 0]


def _ascending(keep: Tensor) -> Tensor:
    """`keep_some`'s rows, ascending, -1 behind."""
    last = torch.iinfo(keep.dtype).max
    ordered = keep.masked_fill(keep < 0, last).sort(1).values
    return ordered.masked_fill(ordered == last, -1)


def train(trainer: Trainer, folder: Path, log: Log, dtype: torch.dtype) -> None:
    """Train what is not done yet, and export the best by validation accuracy."""
    settings = trainer.settings
    total, recent, saved_at = (
        settings.tower_steps + settings.steps,
        list[dict[str, float]](),
        time.monotonic(),
    )
    while trainer.step < total:
        pretraining = trainer.step < settings.tower_steps
        recent.append(trainer.train_step())
        if trainer.step % 50 == 0 or trainer.step in (settings.tower_steps, total):
            names = recent[-1].keys()
            means = {n: float(np.mean([r[n] for r in recent if n in r])) for n in names}
            log(phase="tower" if pretraining else "language", step=trainer.step, **means)
            recent.clear()
        if trainer.step == total or (not pretraining and trainer.step % 500 == 0):
            whole, alone = trainer.validate(objects_alone=False), trainer.validate(objects_alone=True)
            log(phase="validation", step=trainer.step, overall=whole.overall, **whole.by_kind)
            log(phase="objects alone", step=trainer.step, overall=alone.overall, **alone.by_kind)
            both = (whole.overall + alone.overall) / 2
            if both >= trainer.best:
                trainer.best = both
                export(trainer.model, folder / "export", dtype)
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            trainer.save()
            saved_at = time.monotonic()
    trainer.save()


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for state, log and export")
    parser.add_argument("--tower-steps", type=int, default=Settings.tower_steps)
    parser.add_argument("--align-steps", type=int, default=Settings.align_steps)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of phase 2")
    parser.add_argument("--validation-scenes", type=int, default=Settings.validation_scenes)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the export")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    settings = Settings(
        tower_steps=options.tower_steps,
        align_steps=options.align_steps,
        steps=options.steps,
        validation_scenes=options.validation_scenes,
    )
    log = Log(options.out)
    trainer = Trainer(Shape(), settings, options.out, options.seed)
    log(phase="settings", parameters=sum(p.numel() for p in trainer.model.parameters()))
    train(trainer, options.out, log, getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
