# SPDX-License-Identifier: Apache-2.0
"""The demo model: what training computes is what the exported checkpoint computes in transformers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from demo.data import collate
from demo.export import export, processor, tokenizer
from demo.language import keep_some, patch_words
from demo.model import END, IMAGE, START, UNKNOWN, VOCABULARY, VOCABULARY_SIZE, Size, build, words_of
from demo.optim import schedule
from demo.packing import answer_logits, pack
from demo.tower import encode, normalise
from vllm_vtprune import demo_model
from vllm_vtprune.selection import VisionFeatures, get_score
from vllm_vtprune.settings import VisionSettings
from vtprune_eval.calibrate import objects_kept
from vtprune_eval.documents import Page
from vtprune_eval.drawn import draw, questions_many
from vtprune_eval.pictures import EncodedPictures
from vtprune_eval.scene_questions import ask_each, ask_many
from vtprune_eval.scenes import PRINTED, make_scene
from vtprune_eval.setting import Setting
from vtprune_eval.statistics import correlation
from vtprune_eval.tasks import drawn_questions
from vtprune_eval.transformers_backend import LocalModel, LocalRunner
from vtprune_loadtest.questions import is_right

SIZE = Size()


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    made = build(SIZE).eval()
    # Larger weights than a fresh model's, so that a difference in masks or positions shows in the logits.
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made


@pytest.fixture(scope="module")
def exported(model: LlavaForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "export"
    export(model, SIZE, folder)
    return folder


def pictures(count: int, size: int = 168) -> torch.Tensor:
    return normalise(torch.from_numpy(np.stack([make_scene("train", i, size).pixels for i in range(count)])))


@torch.inference_mode()
def test_the_tower_without_its_unused_part_equals_the_whole(model: LlavaForConditionalGeneration) -> None:
    tower, pixels = model.model.vision_tower, pictures(3)
    whole = tower(pixels, output_hidden_states=True)
    states, cls = encode(tower, pixels)
    torch.testing.assert_close(states, whole.hidden_states[-2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cls, whole.pooler_output, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_showing_every_patch_equals_masking_none(model: LlavaForConditionalGeneration) -> None:
    tower, pixels = model.model.vision_tower, pictures(2)
    everything = torch.arange(144).expand(2, -1)
    for masked, plain in zip(encode(tower, pixels, everything), encode(tower, pixels), strict=True):
        torch.testing.assert_close(masked, plain)


@torch.inference_mode()
def test_packed_questions_get_the_logits_they_get_when_asked_alone(
    model: LlavaForConditionalGeneration, exported: Path
) -> None:
    """Alone means: the exported folder, its processor and chat template, transformers' own LLaVA."""
    alone = AutoModelForImageTextToText.from_pretrained(exported).eval()
    prepare = AutoProcessor.from_pretrained(exported)
    scene = make_scene("test", 7)
    questions = ask_each(scene, random.Random(0))
    states, _ = encode(model.model.vision_tower, normalise(torch.tensor(scene.pixels[None])))
    projected = model.model.multi_modal_projector(states[:, 1:])
    logits = answer_logits(model, projected, pack([questions], torch.tensor([144]), torch.device("cpu")))
    assert len(logits) == 2 * len(questions), "the answer and the end after it"
    for number, question in enumerate(questions):
        parts = [{"type": "text", "text": question.text}, {"type": "image"}]
        prompt = prepare.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        inputs = prepare(
            images=Image.fromarray(scene.pixels),
            text=f"{prompt} {question.answer}",
            return_tensors="pt",
            add_special_tokens=False,
        )
        assert inputs.input_ids[0, -1] == VOCABULARY[question.answer]
        single = alone(**inputs).logits[0, -2:]
        torch.testing.assert_close(logits[2 * number : 2 * number + 2], single, atol=1e-4, rtol=1e-3)


def test_batched_packing_equals_packing_one_by_one(model: LlavaForConditionalGeneration) -> None:
    questions = [ask_many(make_scene("train", index), 3 + index, random.Random(index)) for index in range(3)]
    projected = torch.randn(3, 20, SIZE.text_width)
    kept = torch.tensor([20, 7, 1])
    with torch.inference_mode():
        together = answer_logits(model, projected, pack(questions, kept, torch.device("cpu")))
        apart = [
            answer_logits(
                model, projected[k : k + 1, : kept[k]], pack([asked], kept[k : k + 1], torch.device("cpu"))
            )
            for k, asked in enumerate(questions)
        ]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-3)


def test_objects_and_background_are_thinned_apart() -> None:
    shown = torch.zeros(2, 2000, dtype=torch.bool)
    shown[:, :600] = True
    objects, background = [], []
    for seed in range(100):
        keep = keep_some(shown, 0.5, random.Random(seed))
        for row in keep:
            patches = row[row >= 0]
            assert len(patches), "one stays at least"
            assert (row[len(patches) :] == -1).all()
            assert (patches.diff() > 0).all(), "raster order"
            objects.append(float((patches < 600).sum()) / 600)
            background.append(float((patches >= 600).sum()) / 1400)
    assert 0.43 < min(objects) < 0.55 < 0.95 < max(objects)
    assert min(background) == 0
    assert max(background) > 0.95
    assert abs(np.corrcoef(objects, background)[0, 1]) < 0.2


def test_the_exported_tower_has_the_names_of_public_checkpoints(exported: Path) -> None:
    with safe_open(exported / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert {"language_model.lm_head.weight", "language_model.model.embed_tokens.weight"} <= names
    assert all(name.startswith("vision_tower.vision_model.") for name in names if "vision_tower" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_stored_weight_is_loaded_back(
    model: LlavaForConditionalGeneration, tmp_path: Path, dtype: torch.dtype
) -> None:
    export(model, SIZE, tmp_path, dtype)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    wanted = {name: value.to(dtype) for name, value in model.state_dict().items()}
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    assert model.dtype == torch.float32, "exporting leaves the model as it was"


def test_a_model_too_large_to_ship_is_refused(tmp_path: Path) -> None:
    large = Size(text_width=384, text_layers=8)
    with pytest.raises(ValueError, match="make the model smaller or use bfloat16"):
        export(build(large), large, tmp_path)


def test_the_tokenizer_agrees_with_training() -> None:
    tokens = tokenizer()
    for index in range(30):
        for question in ask_each(make_scene("test", index), random.Random(index)):
            assert tokens(question.text, add_special_tokens=False).input_ids == words_of(question.text)
    assert tokens("What COLOUR is the circle?").input_ids[0] == START
    assert tokens.decode([VOCABULARY["top-left"]]) == "top-left"
    assert tokens.eos_token_id == END


def test_a_conversation_is_written_like_llava() -> None:
    prepare = processor(SIZE)
    parts = [{"type": "text", "text": "How many objects?"}, {"type": "image"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "Sure?"},
    ]
    text = prepare.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "<s>USER: <image>\nHow many objects? ASSISTANT: 3</s>USER: Sure? ASSISTANT:"
    ids = prepare(
        images=Image.new("RGB", (500, 300)), text=text, return_tensors="pt", add_special_tokens=False
    ).input_ids[0]
    assert (ids == IMAGE).sum() == 144
    assert ids[0] == START


def test_the_larger_picture_has_576_patches() -> None:
    size = Size(image=336)
    states, _ = encode(build(size).model.vision_tower, pictures(1, 336))
    assert states.shape == (1, 577, size.tower_width)


def test_the_first_heads_start_on_the_neighbouring_patches() -> None:
    tower = build(SIZE).model.vision_tower
    states = tower.pre_layrnorm(tower.embeddings(pictures(1)))
    layer = tower.encoder.layers[0]
    normed = layer.layer_norm1(states)
    query = layer.self_attn.q_proj(normed).unflatten(-1, (8, 16))[0, 1 + 5 * 12 + 5]
    key = layer.self_attn.k_proj(normed).unflatten(-1, (8, 16))[0, 1:]
    found = torch.einsum("hd,phd->hp", query, key).argmax(1)
    offsets = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0)]
    assert found.tolist() == [(5 + dy) * 12 + 5 + dx for dy, dx in offsets]


def with_similarity(scores: torch.Tensor) -> EncodedPictures:
    """Pictures whose patches have these cosines [P, N] to the CLS token."""
    across = (1 - scores**2).clamp(min=0).sqrt()
    features = VisionFeatures(
        patches=torch.stack([scores, across], -1),
        cls=torch.tensor([1.0, 0.0]).expand(len(scores), 2),
        grid=(1, scores.shape[1]),
        seeds=tuple(range(len(scores))),
    )
    return EncodedPictures(None, [], [features])  # type: ignore[arg-type]


def before_the_cut(scores: torch.Tensor, aggressiveness: float = 0.5) -> list[int]:
    (selection,) = with_similarity(scores[None]).select(
        Setting(VisionSettings(aggressiveness=aggressiveness))
    )
    kept: list[int] = selection.indices.tolist()
    return kept


def test_the_cut_falls_where_the_curve_bends() -> None:
    scores = torch.cat([torch.full((20,), 0.1), torch.full((5,), 0.9), torch.full((20,), 0.1)])
    scores += 0.001 * torch.rand(45, generator=torch.Generator().manual_seed(0))
    kept = set(before_the_cut(scores))
    assert set(range(20, 25)) < kept, "the five before the bend"
    assert len(kept) == 6, "and the one at it"
    counts = [len(before_the_cut(scores, a)) for a in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 1)]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (45, 1)
    assert len(before_the_cut(torch.ones(9))) == 9


def test_a_perfect_cls_token_finds_every_object_patch() -> None:
    questions = drawn_questions("test", 12, 168)
    assert questions.objects is not None and questions.owner is not None
    shown = torch.from_numpy(questions.objects).float()
    noise = 0.05 * torch.rand(shown.shape, generator=torch.Generator().manual_seed(0))
    pictures = with_similarity((shown - noise).abs())
    assert (get_score("cosine")(pictures.batches[0]) > 0.9).float().eq(shown).all()
    knee = Setting(VisionSettings(aggressiveness=0.5))
    assert objects_kept(pictures, knee.vision, questions.owner)["patches"] == 1
    counts = np.array(pictures.counts(knee), dtype=np.float64)
    assert correlation(counts, questions.objects.sum(1).astype(np.float64)).value > 0.95
    assert counts.mean() / 144 == pytest.approx(float(shown.mean()), abs=0.1)


@torch.inference_mode()
def test_the_evaluation_answers_as_transformers_generates() -> None:
    """The embedded model through its processor, chat template and `generate`, all questions in one batch."""
    model = LocalModel(str(demo_model.FOLDER))
    questions = drawn_questions("test", 3, model.image_size)
    prepare = AutoProcessor.from_pretrained(demo_model.FOLDER)
    prompts = [
        prepare.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
            add_generation_prompt=True,
        )
        for question in questions.asked
    ]
    inputs = prepare(
        images=[questions.pictures[question.picture] for question in questions.asked],
        text=prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )
    alone = LlavaForConditionalGeneration.from_pretrained(demo_model.FOLDER).eval()
    made = alone.generate(**inputs, max_new_tokens=4, do_sample=False)
    texts = prepare.batch_decode(made[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    replies = LocalRunner(model, questions, frozenset(), 4).answer(Setting())
    assert [reply.text for reply in replies] == [text.strip() for text in texts]
    assert sum(is_right(r.text, q.answers) for r, q in zip(replies, questions.asked, strict=True)) > 15


def test_the_learning_rate_rises_stays_and_falls() -> None:
    shares = [schedule(step, 1000) for step in range(1000)]
    assert shares[0] == pytest.approx(0.02)
    assert max(shares) == shares[300] == shares[600] == 1
    assert shares[-1] == pytest.approx(0.02)


def test_training_sees_scenes_and_pages_and_the_labels_are_theirs() -> None:
    drawn = [draw("train", index) for index in range(30)]
    pages = [picture for picture in drawn if isinstance(picture, Page)]
    assert len(pages) == 10
    batch = collate(drawn)
    for number, picture in enumerate(drawn):
        texts = picture.printed if isinstance(picture, Page) else [t for t in [picture.text] if t is not None]
        first = 0 if isinstance(picture, Page) else len(picture.shapes)
        for row, text in enumerate(texts, start=first):
            assert batch.objects[number, row, 3] == 1 + PRINTED.index(text.word)
            assert 1 <= batch.objects[number, row, 4] <= 9
            patches = torch.from_numpy(picture.owner == row)
            assert (batch.labels[number][patches] == batch.objects[number, row]).all()
    words = patch_words(drawn)
    assert words.shape == (30, 144, 4)
    questions = [questions_many(picture, 4, random.Random(0)) for picture in drawn]
    packed = pack(questions, torch.full((30,), 5), torch.device("cpu"))
    assert len(packed.targets) == 2 * 4 * 30
    assert UNKNOWN not in packed.tokens
    assert len(VOCABULARY) <= VOCABULARY_SIZE
