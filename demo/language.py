# SPDX-License-Identifier: Apache-2.0
"""Phase 2: train projector and language model on the frozen tower's features.

The tower is frozen, so its features are computed once and reused with new questions. Random shares of each
picture's object and background patches are left out, by no selection rule: the answers then come from what
the patches show, and not from where in the sequence or how densely they stand. Many questions share one
sequence, each blind to the others.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from demo.accuracy import Accuracy, Keep, measure
from demo.data import collate, objects_of
from demo.export import export
from demo.model import IGNORE, VOCABULARY, Size
from demo.optim import SAVE_EVERY_S, Log, Optimiser, load, save, schedule
from demo.packing import answer_logits, pack
from demo.tower import encode, normalise
from vtprune_eval.drawn import Drawn, draw, questions_many
from vtprune_eval.scene_questions import EVENLY
from vtprune_eval.scenes import COLOURS, PLACES, PRINTED, SHAPES

# These ask about two things at once and are learnt last.
_HARD = {"yes_no": 2.0, "compare": 2.0, "count": 4.0}


@dataclass(frozen=True)
class LanguageSettings:
    """Length and rates of the language model's training."""

    steps: int = 7200
    scenes: int = 10000
    """Training scenes whose features are kept in memory in the end."""
    first_scenes: int = 2500
    """Those computed before the first step; each step adds five."""
    validation_scenes: int = 100
    batch: int = 8
    questions: int = 16
    kinds: Mapping[str, float] = field(default_factory=lambda: {**EVENLY, **_HARD})
    """How often each kind is asked, relative to the others."""
    align_steps: int = 300
    """Steps of the projector and the word embeddings alone before the language model starts."""
    lr: float = 2e-3
    weight_decay: float = 0.02
    least_share: float = 0.25
    """Between this share and all of an object's patches are shown; of the background, any share."""


@dataclass
class Features:
    """Pictures of a split without their pixels, and the frozen tower's output on them.

    `states` float16 [capacity, 1 + P, width], CLS first; rows from `len(scenes)` on are not filled yet.
    """

    tower: CLIPVisionModel
    split: str
    size: Size
    scenes: list[Drawn]
    states: Tensor

    @classmethod
    def room_for(cls, tower: CLIPVisionModel, split: str, capacity: int, size: Size) -> Features:
        """Empty, with room for the first `capacity` scenes of a split."""
        states = torch.empty(capacity, 1 + size.grid**2, size.tower_width, dtype=torch.float16)
        return cls(tower, split, size, [], states)

    @torch.inference_mode()
    def grow(self, count: int, batch: int = 25) -> Features:
        """Draw the next `count` pictures, as far as there is room, and run the tower on them."""
        device = next(self.tower.parameters()).device
        wanted = min(len(self.states), len(self.scenes) + count)
        while (first := len(self.scenes)) < wanted:
            indices = range(first, min(wanted, first + batch))
            drawn = [draw(self.split, index, self.size.image) for index in indices]
            states, _ = encode(self.tower, normalise(collate(drawn).pixels.to(device)))
            self.states[first : first + len(drawn)] = states.half().cpu()
            self.scenes += [replace(scene, pixels=np.empty((0, 0, 3), np.uint8)) for scene in drawn]
        return self


def patch_words(scenes: list[Drawn]) -> Tensor:
    """The words that each patch shows, as token ids padded with `IGNORE`: int64 [B, P, 4].

    Colour, shape, printed word and place: what the projected patch should be near in the space of word
    embeddings.
    """
    names: tuple[list[str], ...] = (
        list(COLOURS),
        list(SHAPES),
        [],
        list(PRINTED),
        [place for row in PLACES for place in row],
    )
    longest = 1 + max(len(column) for column in names)
    table = torch.full((len(names), longest), IGNORE)
    for column, words in enumerate(names):
        for number, word in enumerate(words):
            table[column, 1 + number] = VOCABULARY[word]
    objects = torch.from_numpy(np.stack([objects_of(scene) for scene in scenes]))
    owner = torch.from_numpy(np.stack([scene.owner for scene in scenes]))
    object_words = table[torch.arange(len(names)), objects][..., [0, 1, 3, 4]]
    shown: Tensor = object_words.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 4))
    return shown.masked_fill((owner < 0)[..., None], IGNORE)


def word_loss(projected: Tensor, words: Tensor, embedding: Tensor) -> Tensor:
    """How far projected patches [N, width] are from naming their words [N, 4].

    `embedding` [vocabulary, width] are the language model's word embeddings.
    """
    scores = F.log_softmax(F.normalize(projected, dim=-1) @ F.normalize(embedding, dim=-1).T * 20, dim=-1)
    known = words != IGNORE
    picked = scores.gather(1, words.clamp(min=0)) * known
    return -(picked.sum(1) / known.sum(1).clamp(min=1))[known.any(1)].mean()


@torch.no_grad()
def start_on_matches(model: LlavaForConditionalGeneration) -> None:
    """Start with keys equal to queries, so that a word attends to patches that show it.

    After Trockman and Kolter 2023 (arXiv 2305.09828); input and output embeddings start (and are trained)
    as one.
    """
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight *= 2
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight


def keep_some(shown: Tensor, least: float, rng: random.Random) -> Tensor:
    """A random subset of each picture's patches: int64 [B, kept] in raster order, -1 behind the shorter ones.

    Objects and background are thinned apart, each picture's objects at a rate of their own and the background
    at one for all of them: what is answered must not hang on how densely either stands, since every selection
    rule changes that.

    Args:
        shown: whether a patch shows an object, bool [B, P].
        least: between this share and all of the objects' patches stay; of the background any share, and a
            third of the time nothing.
        rng: draws the rates and the patches.
    """
    pictures, patches = shown.shape
    background = max(0.0, rng.uniform(-0.5, 1))
    rates = torch.tensor([[background, rng.uniform(least, 1)] for _ in range(pictures)])
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    drawn = torch.rand(pictures, patches, generator=generator)
    stays = drawn < rates.gather(1, shown.long())
    stays |= drawn == drawn.amin(1, keepdim=True)  # one at least
    first = stays.int().sort(dim=1, descending=True, stable=True).indices
    order: Tensor = first[:, : int(stays.sum(1).max())]
    return order.masked_fill(~stays.gather(1, order), -1)


def keep_objects(scenes: list[Drawn]) -> Keep:
    """For `measure`: the patches that show an object, and no background."""
    return lambda number, _: torch.from_numpy(scenes[number].object_patches.reshape(-1)).nonzero()[:, 0]


class Trainer:
    """Projector and language model, their optimiser and their state file `folder`/language.pt."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        size: Size,
        settings: LanguageSettings,
        folder: Path,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.size, self.settings, self.seed = model, size, settings, seed
        self.path, self.step = folder / "language.pt", 0
        start_on_matches(model)
        trained = [model.model.multi_modal_projector, model.model.language_model]
        hidden = [model.model.multi_modal_projector, model.model.language_model.layers]
        self.optimiser = Optimiser(hidden, trained, settings.lr, settings.weight_decay)
        self.parts = {
            "projector": model.model.multi_modal_projector,
            "language": model.model.language_model,
            "optimiser": self.optimiser,
        }
        self.best = 0.0
        if (state := load(self.path)) is not None:
            self.step, self.best = state.pop("step"), state.pop("best")
            for name, saved in state.items():
                self.parts[name].load_state_dict(saved)

    def save(self) -> None:
        """Write the state file."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save(self.path, {"step": self.step, "best": self.best, **parts})

    def train_step(self, data: Features) -> dict[str, float]:
        """One update on freshly drawn questions; the first ones only align the projector."""
        rng = random.Random(f"{self.seed} {self.step}")
        settings, device = self.settings, self.model.device
        chosen = rng.sample(range(len(data.scenes)), settings.batch)
        scenes = [data.scenes[index] for index in chosen]
        shown = torch.from_numpy(np.stack([scene.object_patches.reshape(-1) for scene in scenes]))
        keep = keep_some(shown, settings.least_share, rng)
        padded = keep.clamp(min=0)
        states = data.states[chosen][torch.arange(len(scenes))[:, None], 1 + padded].float().to(device)
        projected = self.model.model.multi_modal_projector(states)
        words = patch_words(scenes).gather(1, padded[..., None].expand(-1, -1, 4))
        words = words.masked_fill((keep < 0)[..., None], IGNORE).to(device)
        embedding = self.model.model.language_model.embed_tokens.weight
        named = word_loss(projected.flatten(0, 1), words.flatten(0, 1), embedding)
        self.step += 1
        if self.step <= settings.align_steps:
            self.optimiser.step(named, schedule(self.step, settings.align_steps, warmup=20))
            return {"words": named.item()}
        questions = [questions_many(scene, settings.questions, rng, settings.kinds) for scene in scenes]
        packed = pack(questions, (keep >= 0).sum(1), device)
        logits = answer_logits(self.model, projected, packed)
        answer = F.cross_entropy(logits, packed.targets)
        done, steps = self.step - settings.align_steps, settings.steps - settings.align_steps
        self.optimiser.step(answer + 0.2 * named, schedule(done, steps, warmup=40))
        first = packed.first
        right = (logits[first].argmax(-1) == packed.targets[first]).float().mean()
        return {"loss": answer.item(), "words": named.item(), "right": right.item()}


def train_language(
    model: LlavaForConditionalGeneration,
    size: Size,
    settings: LanguageSettings,
    folder: Path,
    seed: int,
    log: Log,
) -> Accuracy:
    """Train in place, going on from the state file.

    The best weights by validation accuracy, on whole pictures and on their objects alone, are in
    `folder`/best.pt and, exported, in `folder`/export.
    """
    model.model.vision_tower.eval().requires_grad_(False)
    trainer = Trainer(model, size, settings, folder, seed)
    tower = model.model.vision_tower
    held_out = Features.room_for(tower, "validation", settings.validation_scenes, size)
    held_out.grow(settings.validation_scenes)
    data = Features.room_for(tower, "train", settings.scenes, size)
    data.grow(settings.first_scenes + 5 * trainer.step)
    log(phase="features", validation=len(held_out.scenes), train=len(data.scenes))
    recent: list[dict[str, float]] = []
    saved_at, accuracy = time.monotonic(), Accuracy()
    while trainer.step < settings.steps:
        data.grow(5)  # so that training need not wait for all features
        recent.append(trainer.train_step(data))
        if trainer.step % 50 == 0:
            means = {name: sum(r[name] for r in recent) / len(recent) for name in recent[0]}
            log(phase="language", step=trainer.step, **means)
            recent.clear()
        due = trainer.step % 200 == 0 and trainer.step > settings.align_steps
        if due or trainer.step == settings.steps:
            accuracy = measure(model, held_out.scenes, held_out.states)
            thinned = measure(model, held_out.scenes, held_out.states, keep_objects(held_out.scenes))
            log(phase="validation", step=trainer.step, overall=accuracy.overall, **accuracy.by_kind)
            log(phase="objects alone", step=trainer.step, overall=thinned.overall, **thinned.by_kind)
            if (both := (accuracy.overall + thinned.overall) / 2) > trainer.best:
                trainer.best = both
                save(folder / "best.pt", {"step": trainer.step, "model": model.state_dict()})
                export(model, size, folder / "export")
        if time.monotonic() - saved_at > SAVE_EVERY_S:
            trainer.save()
            saved_at = time.monotonic()
    trainer.save()
    return accuracy
