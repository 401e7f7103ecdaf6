# SPDX-License-Identifier: Apache-2.0
"""The question at stage 1: what rates units by it, and that it belongs to what stays and not to the tower."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, CLIPConfig, CLIPModel, CLIPTokenizer
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache

from tests.conftest import DEMO_MODEL
from tests.helpers.family_processor import processor_of
from tests.helpers.pictures import scene
from vllm_vtprune import request_kwargs
from vllm_vtprune.errors import CheckpointError, PolicyError
from vllm_vtprune.families.base import TowerOutput
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.settings import LONGEST_QUESTION, VisionSettings
from vllm_vtprune.vision.checkpoint import EmbeddingRows
from vllm_vtprune.vision.explain import tower_output
from vllm_vtprune.vision.processor import PrunedProcessor
from vllm_vtprune.vision.question import ClipRater, EmbeddingRater, check_text_tower

CIRCLE, SQUARE = "what color is the circle ?", "how many red squares are there ?"
CONFIG = AutoConfig.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="module")
def processor() -> PrunedProcessor:
    made: PrunedProcessor = processor_of(DEMO_MODEL, max_model_len=None)
    return made


def processed(
    processor: PrunedProcessor, pictures: tuple[int, ...], question: str, cache: Any = None, **fields: Any
) -> tuple[list[str], list[torch.Tensor]]:
    """Each image's key, and which of its tokens stay."""
    items = processor.info.parse_mm_data({"image": [scene(picture) for picture in pictures]})
    kwargs, _ = request_kwargs(question, **{"method": "cdpruner", "keep_ratio": 0.2, **fields})
    prompt = "<image>" * len(pictures) + " ?"
    result: Any = processor(prompt, items, hf_processor_mm_kwargs=kwargs, cache=cache)
    kept = [item["vtprune_kept"].data for item in result["mm_kwargs"]["image"]]
    return result["mm_hashes"]["image"], kept


@contextmanager
def counting_passes(processor: PrunedProcessor) -> Iterator[list[int]]:
    passes: list[int] = []
    processor.vision.observer = lambda images, _: passes.append(images)
    yield passes
    processor.vision.observer = None


def test_two_questions_about_a_picture_run_the_tower_once_and_keep_other_tokens(
    processor: PrunedProcessor,
) -> None:
    cache = MultiModalProcessorOnlyCache(processor.info.ctx.model_config)
    with counting_passes(processor) as passes:
        (first,), (circle,) = processed(processor, (901,), CIRCLE, cache)
        (second,), (square,) = processed(processor, (901,), SQUARE, cache)
        (again,), (same,) = processed(processor, (901,), CIRCLE, cache)
    assert passes == [1]
    assert first != second and not torch.equal(circle, square)
    assert first == again and torch.equal(circle, same)
    assert circle.sum() == square.sum() == 29, "the settings decide how many stay"


def test_a_method_that_does_not_read_it_shares_one_entry(processor: PrunedProcessor) -> None:
    for method in ("inflection", "scope"):
        one, _ = processed(processor, (902,), CIRCLE, method=method)
        other, _ = processed(processor, (902,), SQUARE, method=method)
        assert one == other
    everything, _ = processed(processor, (902,), CIRCLE, keep_ratio=1.0)
    assert everything == processed(processor, (902,), SQUARE, keep_ratio=1.0)[0]


def test_several_pictures_and_many_requests_at_once_change_no_choice(processor: PrunedProcessor) -> None:
    pictures = (903, 904, 905)
    alone = {q: [processed(processor, (p,), q)[1][0] for p in pictures] for q in (CIRCLE, SQUARE)}
    together = processed(processor, pictures, CIRCLE)[1]
    assert all(torch.equal(a, b) for a, b in zip(together, alone[CIRCLE], strict=True))

    def choice(number: int) -> torch.Tensor:
        question = (CIRCLE, SQUARE)[number % 2]
        picture = pictures[number % 3]
        output, _ = tower_output(processor, scene(picture), VisionSettings(keep_ratio=0.5))
        settings = processor._settings(VisionSettings("cdpruner", None, 0.2).asking(question).canonical())
        (rated,) = processor.relevance([output], settings)
        assert rated is not None
        return rated

    with ThreadPoolExecutor(6) as pool:
        rated = list(pool.map(choice, range(12)))
    for number in range(6):
        assert torch.equal(rated[number], rated[number + 6])


def test_without_a_question_the_score_decides(processor: PrunedProcessor) -> None:
    _, (silent,) = processed(processor, (906,), "")
    _, (blank,) = processed(processor, (906,), "  \n ")
    assert torch.equal(silent, blank)
    assert not torch.equal(silent, processed(processor, (906,), SQUARE)[1][0])


def test_a_question_is_bounded_and_spaces_do_not_count() -> None:
    settings = VisionSettings("cdpruner", None, 0.2)
    long = settings.asking("word " * 10_000 + "the end")
    assert len(long.question) <= LONGEST_QUESTION and long.question.endswith("word the end")
    assert settings.asking(" what \n is  it ") == settings.asking("what is it")
    assert VisionSettings.from_canonical(long.canonical()) == long
    assert VisionSettings(keep_ratio=1.0).asking("what").canonical() == "off"


# --- the language model's embeddings -----------------------------------------------------------------------


def test_rows_are_the_checkpoints() -> None:
    weights = load_file(DEMO_MODEL / "model.safetensors")
    (table,) = (v for k, v in weights.items() if k.endswith("embed_tokens.weight"))
    ids = [5, 0, len(table) - 1, 5]
    assert torch.equal(EmbeddingRows.of(str(DEMO_MODEL)).read(ids), table[ids].float())
    assert EmbeddingRows.of(str(DEMO_MODEL)).read([-1, len(table), 7]).shape == (1, table.shape[1])


def test_a_checkpoint_without_embeddings_is_said(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no input embeddings"):
        EmbeddingRows.of(str(tmp_path))


def test_the_fallback_is_the_mean_cosine_with_the_questions_embeddings(processor: PrunedProcessor) -> None:
    rater, tokenizer = processor.rater, processor.info.get_tokenizer()
    assert isinstance(rater, EmbeddingRater)
    output, _ = tower_output(processor, scene(907), VisionSettings())
    rows = EmbeddingRows.of(str(DEMO_MODEL)).read(tokenizer.encode(CIRCLE, add_special_tokens=False))
    projected = processor.vision.encoder.modules["projector"](output.patches)
    slow = [sum(float(cosine_similarity(z, q, dim=0)) for q in rows) / len(rows) for z in projected]
    rated = rater.rate(output, CIRCLE)
    assert rated is not None
    assert rated.tolist() == pytest.approx(slow, abs=1e-5)
    assert rater.rate(output, "") is None


# --- CLIP's text tower -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP whose vision tower is of the demo model's shape."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 600, "max_position_embeddings": 12, "bos_token_id": 512, "eos_token_id": 513}
    vision = CONFIG.vision_config.to_dict()
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["?"]
    vocabulary = {token: i for i, token in enumerate([*letters, *(f"{c}</w>" for c in letters)])}
    vocabulary |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    return folder


def output_of(patches: torch.Tensor) -> TowerOutput:
    return TowerOutput(patches)


def test_the_text_tower_rates_by_the_negative_cosine_in_clips_space(clip: Path) -> None:
    rater, model = ClipRater.load(str(clip), torch.device("cpu")), CLIPModel.from_pretrained(clip).eval()
    patches = torch.randn(9, CONFIG.vision_config.hidden_size)
    rated = rater.rate(output_of(patches), "what is it")
    tokenizer: Any = CLIPTokenizer.from_pretrained(clip)
    ids = tokenizer("what is it").input_ids
    assert 2 < len(ids) <= 12, "one segment"
    with torch.inference_mode():
        text = model.text_projection(model.text_model(torch.tensor([ids])).pooler_output)[0]
        units = model.visual_projection(model.vision_model.post_layernorm(patches))
    assert rated is not None
    assert rated.tolist() == pytest.approx(
        [-float(cosine_similarity(u, text, dim=0)) for u in units], abs=1e-5
    )
    assert rater.rate(output_of(patches), "") is None


def test_a_long_question_is_read_in_segments_and_the_first_four_count(clip: Path) -> None:
    rater = ClipRater.load(str(clip), torch.device("cpu"))
    patches = output_of(torch.randn(9, CONFIG.vision_config.hidden_size))
    words = ["a" * 10, "b" * 10, "c" * 10, "d" * 10, "e" * 10]  # a token a letter: ten to a segment
    each = [rater.rate(patches, word) for word in words]
    for count in (2, 4):
        mean = torch.stack([r for r in each[:count] if r is not None]).mean(0)
        together = rater.rate(patches, " ".join(words[:count]))
        assert together is not None and torch.allclose(together, mean, atol=1e-4)
    five, four = rater.rate(patches, " ".join(words)), rater.rate(patches, " ".join(words[:4]))
    assert five is not None and four is not None and torch.equal(five, four)


def test_a_text_tower_that_does_not_fit_is_refused_before_an_engine(clip: Path, tmp_path: Path) -> None:
    family = family_of(CONFIG)
    check_text_tower(str(clip), family)
    with pytest.raises(PolicyError, match="cannot be read"):
        check_text_tower(str(tmp_path / "nowhere"), family)
    with pytest.raises(PolicyError, match="no CLIP model"):
        check_text_tower(str(DEMO_MODEL), family)
    other = CLIPConfig.from_pretrained(clip)
    other.vision_config.num_hidden_layers += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(PolicyError, match="num_hidden_layers"):
        check_text_tower(str(tmp_path / "other"), family)
    with pytest.raises(PolicyError, match="hidden states of a CLIP tower"):
        check_text_tower(str(clip), SimpleNamespace(clip_units=False))  # type: ignore[arg-type]


def test_the_operators_text_tower_decides_which_tokens_stay(clip: Path, processor: PrunedProcessor) -> None:
    _, (by_embeddings,) = processed(processor, (908,), CIRCLE)
    rater = ClipRater.load(str(clip), processor.vision.encoder.device)
    before = processor.rater
    processor.vision.outcomes.clear()
    processor.__dict__["rater"] = rater
    try:
        _, (by_clip,) = processed(processor, (908,), CIRCLE)
    finally:
        processor.__dict__["rater"] = before
        processor.vision.outcomes.clear()
    assert by_clip.sum() == by_embeddings.sum() and not torch.equal(by_clip, by_embeddings)
