# SPDX-License-Identifier: Apache-2.0
"""vLLM's multimodal processor with stage 1 inside, without an engine behind it.

What an engine worker cannot survive, embeddings that differ in number from their placeholders, is tried here
over caches, hit rates, pre-tokenised prompts and hostile text.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
import torch
from PIL import ExifTags, Image
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache
from vllm.plugins import load_general_plugins

from tests.conftest import DEMO_MODEL
from tests.helpers.kv_config import config
from tests.helpers.pictures import noise, scene
from vllm_vtprune import request_kwargs
from vllm_vtprune.errors import SettingsError
from vllm_vtprune.selection.registry import METHODS
from vllm_vtprune.vision import preprocessing as module
from vllm_vtprune.vision.processor import PrunedProcessor
from vtprune_server import prefetch as prefetching

IMAGE_TOKEN = 3
SETTINGS = [
    request_kwargs(**fields)[0]
    for fields in (
        {},
        {"aggressiveness": 0.5},
        {"aggressiveness": 1.0},
        {"keep_ratio": 0.22},
        {"keep_ratio": 0.22, "method": "random"},
        {"keep_ratio": 0.001, "method": "uniform"},
    )
]


@pytest.fixture(scope="module")
def processor() -> PrunedProcessor:
    load_general_plugins()
    config = EngineArgs(
        str(DEMO_MODEL), dtype="float32", limit_mm_per_prompt={"image": 8}
    ).create_engine_config()
    from vllm.tokenizers import get_tokenizer

    processor = MULTIMODAL_REGISTRY.create_processor(
        config.model_config, tokenizer=get_tokenizer(str(DEMO_MODEL))
    )
    assert isinstance(processor, PrunedProcessor)
    return processor


def prompt_about(images: list[Image.Image]) -> str:
    return "USER: " + "<image>" * len(images) + " What color is the circle? ASSISTANT:"


def run(
    processor: PrunedProcessor,
    images: list[Image.Image],
    kwargs: dict[str, Any],
    prompt: str | list[int] | None = None,
    cache: MultiModalProcessorOnlyCache | None = None,
) -> tuple[list[int], list[torch.Tensor], list[str]]:
    """Prompt ids, embeddings and hashes; checks that placeholders and embeddings agree."""
    if prompt is None:
        prompt = prompt_about(images)
    items = processor.info.parse_mm_data({"image": images})
    result = processor(prompt, items, hf_processor_mm_kwargs=kwargs, cache=cache)
    embeddings = [item["image_embeds"].data for item in result["mm_kwargs"]["image"]]
    ranges = result["mm_placeholders"]["image"]
    assert [r.length for r in ranges] == [e.shape[0] for e in embeddings]
    # a view would keep all images of the request for as long as one of them is cached
    assert all(e.untyped_storage().nbytes() == e.nbytes for e in embeddings)
    for r in ranges:
        assert result["prompt_token_ids"][r.offset : r.offset + r.length] == [IMAGE_TOKEN] * r.length
    return result["prompt_token_ids"], embeddings, result["mm_hashes"]["image"]


def same(a: tuple[Any, Any, Any], b: tuple[Any, Any, Any]) -> bool:
    close = all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a[1], b[1], strict=True))
    return a[0] == b[0] and close and a[2] == b[2]


@pytest.mark.parametrize("hit_rate", [0.3, 0.5, 1.0])
def test_cache_hits_change_nothing(processor: PrunedProcessor, hit_rate: float) -> None:
    rng = random.Random(int(hit_rate * 10))
    pool = [noise(seed) for seed in range(4)]
    cache = MultiModalProcessorOnlyCache(processor.info.ctx.model_config)
    fresh = itertools.count(100)
    for _ in range(12):
        images = [
            rng.choice(pool) if rng.random() < hit_rate else noise(next(fresh))
            for _ in range(rng.randint(1, 4))
        ]
        kwargs = rng.choice(SETTINGS)
        plain = run(processor, images, kwargs)
        assert same(plain, run(processor, images, kwargs, cache=cache))
        # the renderer hands the processor token ids; text and ids must agree
        ids = processor.info.get_tokenizer().encode(prompt_about(images))
        assert same(plain, run(processor, images, kwargs, prompt=ids, cache=cache))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_counts_and_placeholders_equal(processor: PrunedProcessor, method: str) -> None:
    images = [scene(), noise(1), scene(9)]
    for fields in ({"keep_ratio": 0.11}, {"aggressiveness": 0.5}, {"aggressiveness": 1.0}):
        kwargs, _ = request_kwargs(method=method, **fields)
        _, embeddings, _ = run(processor, images, kwargs)
        assert all(1 <= e.shape[0] <= 144 and bool(e.isfinite().all()) for e in embeddings)


def test_each_image_has_its_own_count_and_each_setting_its_own_entry(
    processor: PrunedProcessor,
) -> None:
    cache = MultiModalProcessorOnlyCache(processor.info.ctx.model_config)
    images = [scene(), noise(3)]
    half = run(processor, images, request_kwargs(aggressiveness=0.5)[0], cache=cache)
    most = run(processor, images, request_kwargs(aggressiveness=0.9)[0], cache=cache)
    off = run(processor, images, request_kwargs()[0], cache=cache)
    assert len({e.shape[0] for e in half[1]}) == 2
    assert [e.shape[0] for e in off[1]] == [144, 144]
    assert all(m.shape[0] <= h.shape[0] for m, h in zip(most[1], half[1], strict=True))
    assert len({*half[2], *most[2], *off[2]}) == 6
    # one image more or less in the prompt does not change another's tokens
    alone = run(processor, images[1:], request_kwargs(aggressiveness=0.5)[0])
    assert torch.allclose(alone[1][0], half[1][1], atol=1e-5) and alone[2] == half[2][1:]


def test_another_setting_for_a_known_image_runs_no_tower(processor: PrunedProcessor) -> None:
    passes: list[int] = []
    image = noise(77)
    processor.vision.observer = lambda count, _: passes.append(count)
    try:
        for aggressiveness in (0.3, 0.5, 0.7):
            run(processor, [image], request_kwargs(aggressiveness=aggressiveness)[0])
        assert passes == [1]
        run(processor, [noise(78)], request_kwargs()[0])
        assert passes == [1, 1]
    finally:
        processor.vision.observer = None


def test_prefetching_leaves_nothing_for_the_processor_to_do(
    processor: PrunedProcessor,
) -> None:
    passes: list[int] = []
    image, kwargs = noise(79), request_kwargs(aggressiveness=0.5)[0]
    processor.vision.observer = lambda count, _: passes.append(count)
    try:
        cache = MultiModalProcessorOnlyCache(processor.info.ctx.model_config)
        processor.prefetch({"image": [image]}, kwargs, None, cache)
        assert passes == [1]
        run(processor, [image], kwargs, cache=cache)
        processor.vision.cache.clear()
        # vLLM's own cache holds the item: the tower is not asked
        processor.prefetch({"image": [image]}, kwargs, None, cache)
        assert passes == [1]
    finally:
        processor.vision.observer = None


def _turned(image: Image.Image) -> Image.Image:
    image.getexif()[ExifTags.Base.Orientation] = 6
    return image


@pytest.mark.parametrize(
    ("make", "upright"),
    [
        (lambda: scene(), True),
        (lambda: scene(40).resize((300, 90)), True),
        (lambda: _turned(scene().resize((300, 90))), False),
        (lambda: scene().convert("L"), False),
        (lambda: scene().convert("RGBA"), False),
    ],
)
def test_a_picture_that_vllms_parser_leaves_as_it_is_goes_past_it(
    processor: PrunedProcessor, make: Any, upright: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module._upright(make()) is upright
    (ours,) = processor.preprocessing.together("image", [make()], {})
    monkeypatch.setattr(module, "_upright", lambda image: False)
    (parsed,) = processor.preprocessing.together("image", [make()], {})
    assert ours.places == parsed.places and ours.inputs.keys() == parsed.inputs.keys()
    for name, value in ours.inputs.items():
        assert torch.equal(value, parsed.inputs[name])


def test_prefetching_preprocesses_in_one_torch_thread(processor: PrunedProcessor) -> None:
    """A team for each of several callers would keep all cores busy with waiting."""
    seen: dict[str, int] = {}

    def prefetch(*_: Any) -> tuple[int, int]:
        seen[threading.current_thread().name] = torch.get_num_threads()
        return 0, 0

    renderer = SimpleNamespace(
        get_mm_processor=lambda: processor,
        _process_multimodal_async=AsyncMock(return_value={}),
        _process_multimodal=lambda *_, **__: {},
        _mm_executor=ThreadPoolExecutor(
            1, thread_name_prefix="mm", initializer=torch.set_num_threads, initargs=(3,)
        ),
        mm_processor_cache=None,
    )

    async def ask_twice() -> None:
        asked = [renderer._process_multimodal_async([1], {"image": [scene()]}) for _ in range(2)]
        await asyncio.gather(*asked)

    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(processor, "prefetch", prefetch)
        patch.setattr(prefetching, "make_resendable", lambda *_: None)
        torch.set_num_threads(3)
        try:
            prefetching.install_prefetch(renderer, workers=2)
            asyncio.run(ask_twice())
        finally:
            torch.set_num_threads(before)
    assert {name.partition("_")[0] for name in seen} == {"mm", "vtprune-prefetch"}
    assert set(seen.values()) == {1}


def test_placeholder_text_by_the_user_is_not_an_image(processor: PrunedProcessor) -> None:
    """A prompt with more `<image>` tokens than images: the first stand for images, the others stay text."""
    prompt = "USER: <image> What color is the <image> <image> circle? ASSISTANT:"
    ids, embeddings, _ = run(processor, [scene()], request_kwargs(aggressiveness=0.5)[0], prompt=prompt)
    assert ids.count(IMAGE_TOKEN) == embeddings[0].shape[0] + 2


def test_content_names_a_picture_not_its_wrapper(processor: PrunedProcessor) -> None:
    """A forged EXIF image id must not make two pictures one."""
    import uuid

    forged = []
    for image in (scene(), scene(40)):
        image.getexif()[Image.ExifTags.Base.ImageID] = uuid.UUID(int=1)
        forged.append(image)
    hashes = [run(processor, [image], request_kwargs()[0])[2][0] for image in forged]
    assert hashes[0] != hashes[1]
    assert run(processor, [scene()], request_kwargs()[0])[2][0] == hashes[0]


def test_a_trusted_id_may_be_any_text(processor: PrunedProcessor) -> None:
    """It names the picture's key, from which a method's randomness comes too."""
    built = config(DEMO_MODEL, policy={"trust_image_ids": True, "prune_layer": None}, dtype="float32")
    trusting: Any = MULTIMODAL_REGISTRY.create_processor(built.model_config)
    hashes = []
    for name, fields in [
        ("holiday-photo-17", {"aggressiveness": 0.5}),
        ("holiday-photo-17", {"keep_ratio": 0.25, "method": "random"}),
        ("ein Ausflug", {"keep_ratio": 0.25, "method": "random"}),
    ]:
        result = trusting(
            prompt_about([scene()]),
            trusting.info.parse_mm_data({"image": [scene()]}),
            {"image": [name]},
            request_kwargs(**fields)[0],  # type: ignore[arg-type]
        )
        (item,), (place,) = result["mm_kwargs"]["image"], result["mm_placeholders"]["image"]
        assert item["image_embeds"].data.shape[0] == place.length < 144
        hashes.append(result["mm_hashes"]["image"][0])
    assert len(set(hashes)) == 3


def test_dummy_images_count_unpruned_and_load_no_tower(processor: PrunedProcessor) -> None:
    passes: list[int] = []
    processor.vision.observer = lambda count, _: passes.append(count)
    try:
        inputs = processor.get_dummy_mm_inputs({"image": 2})
    finally:
        processor.vision.observer = None
    assert [r.length for r in inputs["mm_placeholders"]["image"]] == [144, 144]
    assert passes == []


@pytest.mark.parametrize(
    ("size", "mode"),
    [((1, 1), "RGB"), ((1, 1), "L"), ((1, 2000), "RGB"), ((3000, 2), "L"), ((6000, 5000), "RGB")],
)
def test_odd_sizes(processor: PrunedProcessor, size: tuple[int, int], mode: str) -> None:
    _, embeddings, _ = run(processor, [Image.new(mode, size, 128)], request_kwargs(aggressiveness=0.5)[0])
    assert 1 <= embeddings[0].shape[0] <= 144


@pytest.mark.parametrize("bad", ["", "off ", "0.5", '{"aggressiveness":2.0}', "{}"])
def test_settings_that_are_not_canonical_are_refused_before_any_work(
    processor: PrunedProcessor, bad: str
) -> None:
    with pytest.raises(SettingsError, match="request_kwargs"):
        run(processor, [scene()], {"vtprune": bad})
