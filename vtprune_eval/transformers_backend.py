# SPDX-License-Identifier: Apache-2.0
"""The two-stage method on transformers: each picture through the tower once, questions in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vllm_vtprune.selection.registry import METHODS
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.question import question_rater
from vtprune_eval.backend import Reply, RunnerError
from vtprune_eval.borders import Dropping, Prompt
from vtprune_eval.decoder import Decoder
from vtprune_eval.downscale import SmallerPictures
from vtprune_eval.pictures import EncodedPictures
from vtprune_eval.setting import BASELINES, Setting
from vtprune_eval.tasks import Questions

#: Prompt tokens, padding aside, that go through the decoder at once.
_BATCH_TOKENS = 6000


class LocalModel:
    """A LLaVA checkpoint with a CLIP tower and a Llama decoder, on one device."""

    def __init__(self, checkpoint: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        config = AutoConfig.from_pretrained(checkpoint)
        if not isinstance(config, LlavaConfig) or not isinstance(config.text_config, LlamaConfig):
            raise RunnerError(
                f"{checkpoint} is not a LLaVA with a Llama decoder: evaluate it through a server (--server)."
            )
        self.name = Path(checkpoint).name
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint)
        model = LlavaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="sdpa"
        )
        model.eval().requires_grad_(False)
        self.encoder = VisionEncoder.load(config, checkpoint, device=torch.device(device), dtype=dtype)
        self.rater = question_rater(
            self.encoder.family,
            self.encoder.project,
            self.processor.tokenizer,
            checkpoint,
            device=self.encoder.device,
        )
        language: nn.Module = model.model.language_model.to(device)
        ends = model.generation_config.eos_token_id
        stop = frozenset([ends] if isinstance(ends, int) else ends or ())
        self.decoder = Decoder(language, model.lm_head.to(device), stop)
        self.image_token = config.image_token_index
        tokenizer = self.processor.tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids) - {self.image_token}

    @property
    def image_size(self) -> int:
        """Side of a picture in pixels."""
        return int(self.encoder.family.config.vision_config.image_size)

    def encode(self, questions: Questions, outputs: frozenset[str]) -> EncodedPictures:
        """Run the tower over the pictures."""
        return EncodedPictures.encode(
            self.encoder, questions.pictures, self.processor.image_processor, outputs
        )

    def prompts(self, questions: Questions) -> list[Prompt]:
        """The questions through the chat template, cut at the picture."""
        prompts = []
        for question in questions.asked:
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            text = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            ids = self.processor.tokenizer(text, add_special_tokens=False).input_ids
            if ids.count(self.image_token) != 1:
                raise RunnerError(f"The question {question.text!r} must not contain the image placeholder.")
            place = ids.index(self.image_token)
            prompts.append(Prompt(tuple(ids[:place]), question.picture, tuple(ids[place + 1 :])))
        return prompts


class LocalRunner:
    """Answers questions with a `LocalModel`. Settings that keep the same tokens are run once."""

    draws = 5
    baselines = BASELINES

    def __init__(
        self,
        model: LocalModel,
        questions: Questions,
        outputs: frozenset[str],
        limit: int = 16,
        memory: Path | None = None,
    ) -> None:
        """Encode the pictures.

        Args:
            model: what answers.
            questions: what is asked.
            outputs: the tower's optional outputs that the settings read (`vision.features.needs_of`).
            limit: tokens of an answer at most.
            memory: folder of replies, where a setting answered before, by an interrupted run, is found again.
        """
        self._memory = memory
        self.name, self.layers, self.limit = model.name, model.decoder.layers, limit
        self.model, self.questions = model, questions
        self.pictures = model.encode(questions, outputs)
        image_processor = model.processor.image_processor
        self._smaller = SmallerPictures(model.encoder, questions.pictures, image_processor)
        self.prompts = model.prompts(questions)
        self._replies: dict[object, list[Reply]] = {}

    def answer(self, setting: Setting) -> list[Reply]:
        """One reply per question, in their order.

        Raises:
            RunnerError: stage 2 is asked for without a prune layer between the decoder's layers.
        """
        if self._memory is None:
            return self._answered(setting)
        path = self._memory / f"{hashlib.blake2b(repr(setting).encode(), digest_size=12).hexdigest()}.json"
        if path.is_file():
            return [Reply(*(*fields, tuple(above))) for *fields, above in json.loads(path.read_text())]
        replies = self._answered(setting)
        self._memory.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps([astuple(reply) for reply in replies]))
        unfinished.replace(path)
        return replies

    def _answered(self, setting: Setting) -> list[Reply]:
        dropping = self._dropping(setting)
        prompts = self.prompts
        places = [output.places for output in self.pictures.outputs]
        if self._asks(setting):
            # each question has a picture of its own: what stays of it
            pictures = [prompt.picture for prompt in self.prompts]
            relevance = [self._relevance(number) for number in range(len(self.prompts))]
            chosen = self.pictures.select_asked(setting, list(zip(pictures, relevance, strict=True)))
            embeddings = self.pictures.embed(chosen, pictures)
            prompts = [Prompt(p.before, number, p.after) for number, p in enumerate(self.prompts)]
            places = [places[picture] for picture in pictures]
        elif setting.downscales:
            embeddings = self._smaller.embed(self.pictures.counts(setting))
        else:
            embeddings = self.pictures.embed(self.pictures.select(setting))
        key = (_digest(embeddings), dropping)
        if key not in self._replies:
            self._replies[key] = self._answer(embeddings, dropping, prompts, places)
        return self._replies[key]

    def text_states(self, layers: Sequence[int]) -> Tensor:
        """`Decoder.text_states` of all questions about whole pictures, [layers, Q, 2 * hidden]."""
        embeddings = self.pictures.embed(self.pictures.select(Setting()))
        found: dict[int, Tensor] = {}
        for numbers in self._batches(self.prompts, [len(rows) for rows in embeddings], shared=False):
            prompts = [self.prompts[number] for number in numbers]
            states = self.model.decoder.text_states(embeddings, prompts, layers)
            found |= dict(zip(numbers, states.unbind(1), strict=True))
        return torch.stack([found[number] for number in range(len(self.prompts))], dim=1)

    def _asks(self, setting: Setting) -> bool:
        method = METHODS.get(setting.vision.method)
        reads = method is not None and method.reads_question and not setting.vision.keeps_all
        return reads and setting.like is None and self.model.rater is not None

    def _relevance(self, number: int) -> Tensor:
        picture, text = self.prompts[number].picture, self.questions.asked[number].text
        rater = self.model.rater
        rated = None if rater is None else rater.rate(self.pictures.outputs[picture], text)
        if rated is None:
            raise RunnerError(f"The question {text!r} has no word that can be rated.")
        return rated

    def _answer(
        self,
        embeddings: list[Tensor],
        dropping: Dropping | None,
        prompts: Sequence[Prompt],
        places: Sequence[int],
    ) -> list[Reply]:
        """Answer.

        Args:
            embeddings: of the pictures that the prompts name.
            dropping: stage 2.
            prompts: one per question.
            places: of the same pictures, before pruning.
        """
        replies: dict[int, Reply] = {}
        for numbers in self._batches(prompts, [len(rows) for rows in embeddings], shared=dropping is None):
            shown = sorted({prompts[n].picture for n in numbers})
            place = {picture: at for at, picture in enumerate(shown)}
            asked = [Prompt(p.before, place[p.picture], p.after) for p in (prompts[n] for n in numbers)]
            answers = self.model.decoder.answer(
                [embeddings[picture] for picture in shown], asked, dropping, self.limit
            )
            for number, prompt, (tokens, kept) in zip(numbers, asked, answers, strict=True):
                vision = len(embeddings[shown[prompt.picture]])
                replies[number] = Reply(
                    self.model.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
                    places[shown[prompt.picture]],
                    vision,
                    len(prompt.before) + vision + len(prompt.after),
                    kept[0],
                    tuple(kept[1:]),
                )
        return [replies[number] for number in range(len(self.prompts))]

    def _batches(
        self, prompts: Sequence[Prompt], kept: Sequence[int], *, shared: bool
    ) -> Iterator[list[int]]:
        """Numbers of questions to answer together: of similar length, those of a picture side by side."""
        order = sorted(range(len(prompts)), key=lambda n: (kept[prompts[n].picture], n))
        batch: list[int] = []
        tokens = 0
        for picture, numbers in groupby(order, key=lambda n: prompts[n].picture):
            members = list(numbers)
            cost = sum(len(prompts[n].after) for n in members)
            cost += kept[picture] * (1 if shared else len(members))
            if batch and tokens + cost > _BATCH_TOKENS:
                yield batch
                batch, tokens = [], 0
            batch += members
            tokens += cost
        if batch:
            yield batch

    def _dropping(self, setting: Setting) -> Dropping | None:
        if not setting.kv.drops:
            return None
        layers = [prune_layer.layer for prune_layer in setting.prune_layers]
        if not layers or not 1 <= layers[0] <= layers[-1] < self.layers:
            raise RunnerError(
                f"kv_keep {setting.kv.keep:g} needs --prune-layer: 1 to {self.layers - 1} for this decoder."
            )
        return Dropping.of(
            setting.kv,
            setting.prune_layers,
            setting.window,
            setting.relevances,
            self.model.special_ids,
            setting.draw if "random" in setting.relevances else 0,
        )


def _digest(embeddings: Sequence[Tensor]) -> bytes:
    digest = hashlib.blake2b()
    for rows in embeddings:
        digest.update(len(rows).to_bytes(4))
        digest.update(rows.float().cpu().numpy().tobytes())
    return digest.digest()
