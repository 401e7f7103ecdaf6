# SPDX-License-Identifier: Apache-2.0
"""Train a small Qwen3-VL on the demo's pictures and export it: `python -m demo.train_qwen3_vl --out DIR`.

Phase 1 teaches the tower's patches to name what they show; phase 2 trains mergers and language model on the
frozen tower's states, with units left out at random as the demo model's patches are. Both resolutions take
turns. Every phase saves its state each two minutes: run the same command again to go on. The best weights by
validation accuracy are exported to `DIR/export`; serve them with `vtprune serve DIR/export`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from demo.accuracy import Accuracy
from demo.data import Batch, batches
from demo.language import LanguageSettings, keep_some, patch_words, start_on_matches, word_loss
from demo.model import IGNORE
from demo.optim import SAVE_EVERY_S, Log, Optimiser, load, save, schedule
from demo.qwen3_vl import (
    MERGE,
    SIDES,
    Looked,
    Shape,
    answer_logits,
    build,
    export,
    look,
    merge,
    pack_questions,
    unit_patches,
)
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
    """Pictures of the smaller resolution; of the larger, half as many, which are twice as many patches."""
    pictures: int = 5000
    """Pictures of each resolution whose states are kept in memory in the end: 370 KB of both together."""
    first_pictures: int = 800
    """Those looked at before phase 2's first step; each step adds two."""
    validation_scenes: int = 100
    lr: float = 2e-3
    weight_decay: float = 0.02


@dataclass
class Features:
    """Pictures of one side without their pixels, and what the frozen tower made of them, in 16 bits."""

    side: int
    split: str
    pictures: list[Drawn] = field(default_factory=list)
    looked: list[Looked] = field(default_factory=list)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of units."""
        units = self.side // PATCH // MERGE
        return units, units

    @torch.inference_mode()
    def grow(self, model: Any, count: int, batch: int = 20) -> None:
        """Draw the split's next `count` pictures and run the tower over them."""
        wanted = len(self.pictures) + count
        while (first := len(self.pictures)) < wanted:
            drawn = [draw(self.split, k, self.side) for k in range(first, min(wanted, first + batch))]
            looked = look(model, torch.from_numpy(np.stack([one.pixels for one in drawn])))
            for k in range(len(drawn)):
                levels = [level[k].half() for level in looked.levels]
                self.looked.append(Looked(looked.patches[k].half(), levels))
            self.pictures += [replace(one, pixels=np.empty((0, 0, 3), np.uint8)) for one in drawn]

    def batch(self, chosen: list[int]) -> tuple[list[Drawn], Looked]:
        """These pictures and their states."""
        looked = [self.looked[k] for k in chosen]
        levels = [torch.stack(level).float() for level in zip(*(one.levels for one in looked), strict=True)]
        patches = torch.stack([one.patches for one in looked]).float()
        return [self.pictures[k] for k in chosen], Looked(patches, levels)


class Trainer:
    """The model, its patch heads, their optimisers and their state file `folder`/state.pt."""

    def __init__(self, shape: Shape, settings: Settings, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.settings, self.seed, self.path, self.step = settings, seed, folder / "state.pt", 0
        self.model: Any = build(shape)
        start_on_matches(cast(Any, self.model))
        self.heads = Heads(shape.tower_width)
        visual, language = self.model.model.visual, self.model.model.language_model
        mergers = [visual.merger, visual.deepstack_merger_list]
        rate = (settings.lr, settings.weight_decay)
        tower = [visual.patch_embed, visual.pos_embed, visual.blocks]
        self.tower = Optimiser([visual.blocks], [*tower, self.heads], *rate)
        self.language = Optimiser([*mergers, language.layers], [*mergers, language], *rate)
        self.best = 0.0
        self.parts: dict[str, Any] = {
            "model": self.model,
            "heads": self.heads,
            "tower": self.tower,
            "language": self.language,
        }
        if (state := load(self.path)) is not None:
            self.step, self.best = state.pop("step"), state.pop("best")
            for name, saved in state.items():
                self.parts[name].load_state_dict(saved)

    def save(self) -> None:
        """Write the state file."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save(self.path, {"step": self.step, "best": self.best, **parts})

    def tower_step(self, drawn: Batch) -> dict[str, float]:
        """One update of the tower on pictures never seen before."""
        self.step += 1
        order = unit_patches(drawn.pixels.shape[1] // PATCH).flatten()
        patches = look(self.model, drawn.pixels).patches
        named, right = self.heads.name_patches(patches, drawn.labels[:, order])
        self.tower.step(named, schedule(self.step, self.settings.tower_steps))
        return {"patches": named.item(), **{name: value.item() for name, value in right.items()}}

    def language_step(self, data: Features) -> dict[str, float]:
        """One update of mergers and language model on freshly drawn questions; the first only align."""
        settings, rng = self.settings, random.Random(f"{self.seed} {self.step}")
        self.step += 1
        pictures, looked = data.batch(rng.sample(range(len(data.pictures)), settings.batch))
        order = unit_patches(data.side // PATCH)
        keep = keep_some(shown_units(pictures, order), _LANGUAGE.least_share, rng)
        seen = merge(self.model, looked)
        words = word_loss(
            seen.units.flatten(0, 1),
            unit_words(pictures, order).flatten(0, 1),
            self.model.model.language_model.embed_tokens.weight,
        )
        done = self.step - settings.tower_steps
        if done <= settings.align_steps:
            self.language.step(words, schedule(done, settings.align_steps, warmup=20))
            return {"words": words.item()}
        questions = [questions_many(one, _LANGUAGE.questions, rng, _LANGUAGE.kinds) for one in pictures]
        ascending = _ascending(keep)
        packed = pack_questions(questions, ascending)
        logits = answer_logits(self.model, seen.kept(ascending), ascending, data.grid, packed)
        answer = F.cross_entropy(logits, packed.targets)
        share = schedule(done - settings.align_steps, settings.steps - settings.align_steps, warmup=40)
        self.language.step(answer + 0.2 * words, share)
        asked = packed.first
        answered = (logits[asked].argmax(-1) == packed.targets[asked]).float().mean()
        return {"loss": answer.item(), "words": words.item(), "right": answered.item()}

    @torch.inference_mode()
    def validate(self, held_out: list[Features], objects_alone: bool) -> Accuracy:
        """One question of every kind about each picture: its word and the end after it must be right."""
        accuracy = Accuracy()
        for data in held_out:
            order = unit_patches(data.side // PATCH)
            for number in range(len(data.pictures)):
                (picture,), looked = data.batch([number])
                shown = shown_units([picture], order)
                keep = torch.arange(shown.shape[1])[None]
                if objects_alone and bool(shown.any()):
                    keep = shown[0].nonzero().T
                questions = questions_each(picture, random.Random(f"0 {number}"))
                packed = pack_questions([questions], keep)
                kept = merge(self.model, looked).kept(keep)
                logits = answer_logits(self.model, kept, keep, data.grid, packed)
                right = logits.argmax(-1) == packed.targets
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


class _Reporter:
    """Means of the steps since the last line, and the state file every two minutes."""

    def __init__(self, trainer: Trainer, log: Log) -> None:
        self.trainer, self.log, self.saved_at = trainer, log, time.monotonic()
        self.recent: list[dict[str, float]] = []

    def __call__(self, phase: str, result: dict[str, float], last: bool) -> None:
        self.recent.append(result)
        if self.trainer.step % 50 == 0 or last:
            means = {n: float(np.mean([r[n] for r in self.recent if n in r])) for n in result}
            self.log(phase=phase, step=self.trainer.step, **means)
            self.recent.clear()
        if last or time.monotonic() - self.saved_at > SAVE_EVERY_S:
            self.trainer.save()
            self.saved_at = time.monotonic()


def pretrain(trainer: Trainer, log: Log) -> None:
    """Phase 1."""
    settings, report = trainer.settings, _Reporter(trainer, log)
    counts = [settings.tower_batch * min(SIDES) // side for side in SIDES]
    data: list[Iterator[Batch]] = []  # each draws in a process of its own
    while (left := settings.tower_steps - trainer.step) > 0:
        if not data:
            drawn_before = trainer.step // len(SIDES)
            data = [
                batches("train", drawn_before * n, n, side) for n, side in zip(counts, SIDES, strict=True)
            ]
        drawn = next(data[trainer.step % len(SIDES)])
        report("tower", trainer.tower_step(drawn), left == 1)


def train_language(trainer: Trainer, folder: Path, log: Log, dtype: torch.dtype) -> None:
    """Phase 2, and the export of the best weights by validation accuracy."""
    settings, report = trainer.settings, _Reporter(trainer, log)
    total = settings.tower_steps + settings.steps
    if trainer.step >= total:
        return
    held_out = [Features(side, "validation") for side in SIDES]
    data = [Features(side, "train") for side in SIDES]
    for kept in held_out:
        kept.grow(trainer.model, settings.validation_scenes // len(SIDES))
    for kept in data:
        done = trainer.step - settings.tower_steps
        kept.grow(trainer.model, min(settings.pictures, settings.first_pictures + done))
    log(
        phase="features",
        validation=[len(x.pictures) for x in held_out],
        train=[len(x.pictures) for x in data],
    )
    while trainer.step < total:
        kept = data[trainer.step % len(SIDES)]
        kept.grow(trainer.model, min(2, settings.pictures - len(kept.pictures)))
        result = trainer.language_step(kept)
        report("language", result, trainer.step == total)
        if trainer.step == total or trainer.step % 500 == 0:
            whole = trainer.validate(held_out, objects_alone=False)
            alone = trainer.validate(held_out, objects_alone=True)
            log(phase="validation", step=trainer.step, overall=whole.overall, **whole.by_kind)
            log(phase="objects alone", step=trainer.step, overall=alone.overall, **alone.by_kind)
            both = (whole.overall + alone.overall) / 2
            if both >= trainer.best:
                trainer.best = both
                export(trainer.model, folder / "export", dtype)
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
    parser.add_argument(
        "--pictures", type=int, default=Settings.pictures, help="of each resolution, kept in memory"
    )
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
        pictures=options.pictures,
        validation_scenes=options.validation_scenes,
    )
    log = Log(options.out)
    trainer = Trainer(Shape(), settings, options.out, options.seed)
    log(phase="settings", parameters=sum(p.numel() for p in trainer.model.parameters()))
    pretrain(trainer, log)
    train_language(trainer, options.out, log, getattr(torch, options.dtype))


if __name__ == "__main__":
    main()
