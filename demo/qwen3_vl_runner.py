# SPDX-License-Identifier: Apache-2.0
"""The small Qwen3-VL under `vtprune_eval`: stage 1 by the engine's own code, answers by transformers.

All questions about a picture are asked in one pass (`demo.packing`), each blind to the others, so that a
study of every method takes minutes. A reply is what greedy decoding begins with: the likeliest word, and a
mark behind it where the end would not follow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from demo.model import END, words_of
from demo.qwen3_vl import MERGE, PREFIX, Seen, answer_logits, pack_questions, see
from vllm_vtprune.families.base import Item
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.features import stack
from vtprune_eval.backend import Reply, RunnerError
from vtprune_eval.downscale import smaller_grid
from vtprune_eval.pictures import EncodedPictures
from vtprune_eval.scene_questions import SceneQuestion
from vtprune_eval.scenes import PATCH
from vtprune_eval.setting import BASELINES, Setting
from vtprune_eval.tasks import Questions, drawn_questions

_BATCH = 20


class Qwen3VLRunner:
    """Answers drawn questions with an exported checkpoint."""

    draws = 5
    baselines = BASELINES

    def __init__(
        self, folder: Path, split: str, count: int, side: int, domain: str, outputs: frozenset[str]
    ) -> None:
        """Draw pictures and questions, and run the tower.

        Args:
            folder: the exported checkpoint.
            split: of the drawn pictures.
            count: pictures.
            side: of each, in pixels, a multiple of a unit's.
            domain: scenes or documents.
            outputs: the tower's optional outputs that the settings read (`vision.features.needs_of`).

        Raises:
            RunnerError: units do not fill the side.
        """
        unit = MERGE * PATCH
        if side % unit:
            raise RunnerError(f"A picture's side must be a multiple of {unit} pixels, not {side}.")
        self.name, self.grid = folder.name, (side // unit, side // unit)
        self.questions: Questions = drawn_questions(split, count, side, domain)
        self._asked: list[list[SceneQuestion]] = [[] for _ in range(count)]
        for question in self.questions.asked:
            asked = SceneQuestion(question.kind, question.text, question.answers[0])
            self._asked[question.picture].append(asked)
        self._model = cast(Any, Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32))
        self._model.eval().requires_grad_(False)
        self.layers: int | None = int(self._model.config.get_text_config().num_hidden_layers)
        self._processor: Any = AutoProcessor.from_pretrained(folder)
        encoder = VisionEncoder.load(
            self._model.config, str(folder), device=torch.device("cpu"), dtype=torch.float32
        )
        self.pictures = self._encoded(encoder, outputs)
        self._replies: dict[bytes, list[Reply]] = {}

    def _encoded(self, encoder: VisionEncoder, outputs: frozenset[str]) -> EncodedPictures:
        images = self.questions.pictures
        whole, batches = [], []
        for first in range(0, len(images), _BATCH):
            items = []
            for image in images[first : first + _BATCH]:
                prepared = self._processor.image_processor(images=[image], return_tensors="pt")
                grid = torch.as_tensor(prepared["image_grid_thw"])[0]
                items.append(
                    Item({"pixel_values": torch.as_tensor(prepared["pixel_values"]), "image_grid_thw": grid})
                )
            encoded = encoder.encode(items, outputs)
            ((_, features),) = stack(encoded, range(first, first + len(items)))
            whole += encoded
            batches.append(features)
        return EncodedPictures(encoder, whole, batches)

    def answer(self, setting: Setting) -> Sequence[Reply]:
        """One reply per question, in their order.

        Raises:
            RunnerError: the setting drops tokens in the decoder.
        """
        if setting.kv.drops:
            raise RunnerError("This runner prunes in stage 1 alone: leave out kv_keep.")
        if setting.downscales:
            shown = [self._smaller(n, count) for n, count in enumerate(self.pictures.counts(setting))]
        else:
            selections = self.pictures.select(setting)
            embeddings = self.pictures.embed(selections)
            shown = [
                (self._seen(rows), selection.indices[None], self.grid)
                for rows, selection in zip(embeddings, selections, strict=True)
            ]
        digest = hashlib.blake2b()
        for seen, keep, _ in shown:
            digest.update(keep.numpy().tobytes() + seen.units.numpy().tobytes())
        if (key := digest.digest()) not in self._replies:
            self._replies[key] = [
                reply for number, one in enumerate(shown) for reply in self._ask(number, *one)
            ]
        return self._replies[key]

    def _seen(self, rows: Tensor) -> Seen:
        """A picture's embeddings [k, width * (1 + levels)], taken apart."""
        units, *levels = rows[None].chunk(
            1 + len(self._model.config.vision_config.deepstack_visual_indexes), -1
        )
        return Seen(units, levels)

    @torch.inference_mode()
    def _smaller(self, number: int, count: int) -> tuple[Seen, Tensor, tuple[int, int]]:
        """The picture itself in about so many units, as near a square as rows and columns allow."""
        grid = smaller_grid(self.grid, count)
        size = grid[1] * MERGE * PATCH, grid[0] * MERGE * PATCH
        picture = self.questions.pictures[number].resize(size, Image.Resampling.BICUBIC)
        seen = see(self._model, torch.from_numpy(np.asarray(picture).copy())[None])
        return seen, torch.arange(grid[0] * grid[1])[None], grid

    @torch.inference_mode()
    def _ask(self, number: int, seen: Seen, keep: Tensor, grid: tuple[int, int]) -> list[Reply]:
        asked = self._asked[number]
        packed = pack_questions([asked], keep)
        likeliest = answer_logits(self._model, seen, keep, grid, packed).argmax(-1).view(-1, 2).tolist()
        places, kept = self.grid[0] * self.grid[1], keep.shape[1]
        replies = []
        for question, (word, end) in zip(asked, likeliest, strict=True):
            # behind the picture its end, the question and the sign that the answer follows
            tokens = len(PREFIX) + kept + 1 + len(words_of(question.text)) + 1
            text = self._processor.tokenizer.decode([word])
            replies.append(Reply(text if end == END else f"{text} …", places, kept, tokens, tokens))
        return replies
