# SPDX-License-Identifier: Apache-2.0
"""Tower and projector against transformers' own LLaVA; checkpoint reading; the tower's cache and batching."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tests.conftest import DEMO_MODEL
from tests.helpers.checkpoints import edit_config, random_llava
from vllm_vtprune.errors import CheckpointError
from vllm_vtprune.families.base import OPTIONAL_OUTPUTS, Item, Kept, TowerOutput
from vllm_vtprune.families.llava import Llava
from vllm_vtprune.vision import service as vision_service
from vllm_vtprune.vision.checkpoint import load_vision_weights
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.feature_cache import FeatureCache
from vllm_vtprune.vision.features import everything
from vllm_vtprune.vision.service import VisionService
from vllm_vtprune.vision.tower_pass import TracedPass

SHAPE = {"image_size": 56, "layers": 1, "heads": 2, "kv_heads": 2, "hidden": 64}


def load(folder: Path) -> VisionEncoder:
    config = LlavaConfig.from_pretrained(folder)
    return VisionEncoder.load(config, str(folder), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llava(tmp_path_factory.mktemp("llava"), **SHAPE)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> VisionEncoder:
    return load(checkpoint)


def pixels(count: int, size: int = 56) -> Tensor:
    return torch.randn((count, 3, size, size), generator=torch.Generator().manual_seed(count))


def items(values: Tensor) -> list[Item]:
    return [Item({"pixel_values": v}) for v in values]


def projected(encoder: VisionEncoder, output: TowerOutput, kept: Tensor | None = None) -> Tensor:
    """The embeddings of what stays: all patches, or those of these numbers."""
    whole = everything(output)
    return encoder.project([whole if kept is None else Kept(output, kept, output.patches[kept])])[0][0]


def weights_of(source: str, **where: str) -> dict[str, Tensor]:
    """A LLaVA checkpoint's tower and projector."""
    return load_vision_weights(source, Llava(LlavaConfig()).rename, **where)


@pytest.mark.parametrize("folder", ["random", "demo"])
def test_unpruned_embeddings_are_those_of_transformers(folder: str, checkpoint: Path) -> None:
    path = checkpoint if folder == "random" else DEMO_MODEL
    size = 56 if folder == "random" else 168
    reference = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    values = pixels(3, size)
    with torch.inference_mode():
        expected = reference.model.get_image_features(pixel_values=values).pooler_output
    ours = load(path)
    got = [projected(ours, output) for output in ours.encode(items(values))]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        assert (mine - theirs).abs().max() < 1e-5


def test_optional_outputs_are_the_towers_attention(checkpoint: Path, encoder: VisionEncoder) -> None:
    values = pixels(2)
    outputs = encoder.encode(items(values), OPTIONAL_OUTPUTS)
    tower = encoder.modules["tower"]
    tower.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = tower(values, output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    weights = torch.stack(attentions, dim=1)  # [B, L, heads, 1 + N, 1 + N]
    for i, output in enumerate(outputs):
        assert output.cls_attention is not None and output.keys is not None
        assert output.received is not None and output.received_midway is not None
        assert torch.allclose(output.cls_attention, weights[i, :, :, 0, 1:].mean(1), atol=1e-6)
        received = weights[i, :, :, :, 1:].mean((1, 2))  # [L, N]
        middle = max(round(len(received) * 9 / 24) - 1, 0)
        assert torch.allclose(output.received, received[-1:], atol=1e-6)
        assert torch.allclose(output.received_midway, received[middle : middle + 1], atol=1e-6)
        assert output.keys.shape == output.patches.shape


@pytest.mark.parametrize("outputs", [frozenset(), OPTIONAL_OUTPUTS, frozenset({"received"})])
def test_a_traced_pass_is_the_tower_whatever_the_batch(checkpoint: Path, outputs: frozenset[str]) -> None:
    encoder = load(checkpoint)
    fixed, tower = encoder.family._fixed, encoder.modules["tower"]  # type: ignore[attr-defined]
    for values in (pixels(5), pixels(1), pixels(2)):
        with torch.inference_mode():
            hidden, extra = fixed.run(tower, values, outputs)
            assert torch.equal(hidden, tower(values).last_hidden_state)
            untraced = fixed._pass(tower, outputs, values)
        assert isinstance(fixed._passes._passes[outputs], TracedPass), "it ran as Python"
        assert extra.keys() == outputs
        for mine, theirs in zip((hidden, *(extra[n] for n in sorted(extra))), untraced, strict=True):
            assert torch.equal(mine, theirs)


def test_a_tower_that_cannot_be_traced_runs_as_it_is(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load(checkpoint).encode(items(pixels(2)), OPTIONAL_OUTPUTS)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no tracing here")

    monkeypatch.setattr(torch.jit, "trace", refuse)
    with caplog.at_level(logging.WARNING, logger="vllm_vtprune"):
        outputs = load(checkpoint).encode(items(pixels(2)), OPTIONAL_OUTPUTS)
    assert "could not be traced" in caplog.text
    for output, before in zip(outputs, expected, strict=True):
        assert torch.equal(output.patches, before.patches)
        assert output.received is not None and before.received is not None
        assert torch.equal(output.received, before.received)


def test_only_kept_tokens_are_projected_and_the_rest_does_not_matter(encoder: VisionEncoder) -> None:
    output = encoder.encode(items(pixels(1)))[0]
    kept = torch.tensor([0, 3, 7])
    assert torch.allclose(projected(encoder, output, kept), projected(encoder, output)[kept], atol=1e-6)


def test_a_feature_strategy_with_cls_puts_it_first(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    full = load(edit_config(tmp_path, {"vision_feature_select_strategy": "full"}))
    (item,) = items(pixels(1))
    output = full.encode([dataclasses.replace(item, places=17)])[0]
    rows = projected(full, output, torch.arange(5))
    assert rows.shape[0] == 6
    assert torch.allclose(rows[1:], projected(load(checkpoint), output, torch.arange(5)), atol=1e-6)


def test_both_naming_schemes_and_shards_give_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    other = random_llava(tmp_path / "names", public_names=False, **SHAPE)  # type: ignore[arg-type]
    expected = weights_of(str(checkpoint))
    tensors = load_file(checkpoint / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {name: shard for shard, keys in halves.items() for name in keys}
    # a shard without vision weights is never opened: it need not even be there
    index["language_model.lm_head.weight"] = "absent.safetensors"
    for shard, keys in halves.items():
        save_file({f"model.{k}": tensors[k] for k in keys}, sharded / shard)
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {f"model.{k}": v for k, v in index.items()}})
    )
    for source in (other, sharded):
        ours = weights_of(str(source))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_what_is_wrong_with_a_checkpoint_is_said(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        weights_of(str(tmp_path))
    tensors = load_file(checkpoint / "model.safetensors")
    text_only = {k: v for k, v in tensors.items() if not k.startswith("vision_tower")}
    save_file(text_only, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="vision_tower"):
        load(tmp_path)
    save_file(
        {k: v for k, v in tensors.items() if "layers.0.mlp" not in k or "vision" not in k},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match="lacks 4 weights of the vision tower"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="one feature layer"):
        load(edit_config(tmp_path, {"vision_feature_layer": [-2, -3]}))
    with pytest.raises(CheckpointError, match="does not exist"):
        load(edit_config(tmp_path, {"vision_feature_layer": -9}))


def output_of(size: int) -> TowerOutput:
    return TowerOutput(patches=torch.zeros((size, 1), dtype=torch.uint8))


def test_the_cache_is_bounded_in_bytes_and_forgets_the_least_recently_used() -> None:
    cache = FeatureCache(100)
    for key in "abcd":
        cache.put(key, output_of(30))
        assert cache.get("a") is not None or key == "d"
    assert cache.get("b") is None and cache.get("a") is not None and cache.nbytes == 90
    cache.put("big", output_of(101))
    assert cache.get("big") is None and cache.nbytes == 90
    cache.put("a", output_of(10))
    assert cache.nbytes == 70
    assert cache.get("a", frozenset({"keys"})) is None
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)


class CountingEncoder:
    """Stands in for the tower: counts passes and their threads, can be held back, can fail."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.threads: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.error: Exception | None = None

    device = torch.device("cpu")

    def work(self, _: Item) -> int:
        return 10**8

    def patches(self, item: Item) -> int:
        return int(item.inputs["patches"])

    def encode(self, images: list[Item], outputs: frozenset[str]) -> list[TowerOutput]:
        self.go.wait()
        if self.error is not None:
            raise self.error
        self.batches.append(len(images))
        self.threads.append(torch.get_num_threads())
        return [TowerOutput(patches=image.inputs["pixel_values"].reshape(1, -1)) for image in images]


def service(capacity: int = 1 << 20, max_batch: int = 16) -> tuple[VisionService, CountingEncoder]:
    encoder = CountingEncoder()
    return VisionService(encoder, FeatureCache(capacity), max_batch=max_batch), encoder  # type: ignore[arg-type]


def numbers(keys: list[str], patches: int = 576):  # type: ignore[no-untyped-def]
    def prepare(positions: list[int]) -> list[Item]:
        values = [torch.tensor([float(keys[i][1:])]) for i in positions]
        return [Item({"pixel_values": value, "patches": torch.tensor(patches)}) for value in values]

    return prepare


def test_each_picture_is_encoded_once_and_answers_keep_their_order() -> None:
    tower, encoder = service()
    keys = ["k1", "k2", "k1", "k3"]
    got = [float(o.patches) for o in tower.encode(keys, numbers(keys))]
    assert got == [1, 2, 1, 3]
    assert sum(encoder.batches) == 3
    assert [float(o.patches) for o in tower.encode(["k3", "k1"], numbers([]))] == [3, 1]
    assert sum(encoder.batches) == 3


def test_concurrent_callers_share_a_pass() -> None:
    tower, encoder = service()
    encoder.go.clear()
    results: dict[str, float] = {}

    def ask(name: str) -> None:
        results[name] = float(tower.encode([name], numbers([name]))[0].patches)

    names = [f"k{i}" for i in range(9)] + ["k0", "k1"]
    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    while len(tower._waiting) < 8:
        pass
    encoder.go.set()
    for thread in threads:
        thread.join(10)
    assert results == {name: float(name[1:]) for name in names}
    assert encoder.batches == [1, 8]


def test_images_that_wait_for_a_pass_are_told_of_and_none_is_left_over() -> None:
    tower, encoder = service(max_batch=4)
    changes: list[int] = []
    tower.waiting_observer = changes.append
    encoder.go.clear()
    names = [f"k{i}" for i in range(9)]
    threads = [threading.Thread(target=tower.encode, args=([name], numbers([name]))) for name in names]
    for thread in threads:
        thread.start()
    while sum(changes) != 8 or len(tower._waiting) != 8:
        pass  # the ninth is in the pass under way
    encoder.go.set()
    for thread in threads:
        thread.join(10)
    assert sum(changes) == 0 and sorted(changes)[:2] == [-4, -4]
    encoder.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError):
        tower.encode(["k10"], numbers(["k10"]))
    assert sum(changes) == 0


def test_a_pass_holds_at_most_max_batch() -> None:
    tower, encoder = service(max_batch=4)
    keys = [f"k{i}" for i in range(10)]
    assert len(tower.encode(keys, numbers(keys))) == 10
    assert sum(encoder.batches) == 10 and max(encoder.batches) <= 4


def test_a_large_picture_counts_as_several() -> None:
    tower, encoder = service(max_batch=4)
    keys = [f"k{i}" for i in range(4)]
    tower.encode(keys, numbers(keys, patches=2000))
    assert encoder.batches == [2, 2]
    tower.encode(["k9"], numbers(["k9"], patches=100_000))
    assert encoder.batches == [2, 2, 1]


@pytest.mark.parametrize(
    ("device", "threads", "expected"),
    [("cpu", 0, [1, 3]), ("cpu", 2, [2, 2]), ("meta", 0, [1, 1]), ("meta", 2, [2, 2])],
)
def test_threads_of_a_pass(
    device: str, threads: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small pass has one thread, a large one torch's choice, on a device one; the caller keeps its own."""
    monkeypatch.setattr(vision_service, "_TORCH_THREADS", 3)
    encoder = CountingEncoder()
    encoder.device = torch.device(device)
    tower = VisionService(encoder, FeatureCache(1 << 20), threads=threads)  # type: ignore[arg-type]
    before = torch.get_num_threads()
    tower.encode(["k0"], numbers(["k0"]))
    keys = [f"k{i}" for i in range(1, 11)]
    tower.encode(keys, numbers(keys))
    assert encoder.threads == expected
    assert torch.get_num_threads() == before


def test_a_failure_reaches_the_caller_and_the_next_request_works() -> None:
    tower, encoder = service()
    encoder.error = RuntimeError("out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        tower.encode(["k1"], numbers(["k1"]))
    encoder.error = None
    assert float(tower.encode(["k1"], numbers(["k1"]))[0].patches) == 1
    with pytest.raises(ZeroDivisionError):
        tower.encode(["k2"], lambda _: 1 / 0)  # type: ignore[arg-type,return-value]


def test_without_a_cache_everything_still_works() -> None:
    tower, encoder = service(capacity=0)
    for _ in range(2):
        assert float(tower.encode(["k1"], numbers(["k1"]))[0].patches) == 1
    assert encoder.batches == [1, 1]


def test_a_hub_checkpoint_is_fetched_shard_by_shard(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the hub: only the index and the shards with vision weights are asked for."""
    from huggingface_hub.errors import EntryNotFoundError

    tensors = load_file(checkpoint / "model.safetensors")
    vision = {k: v for k, v in tensors.items() if not k.startswith("language_model")}
    save_file(vision, tmp_path / "vision.safetensors")
    index = dict.fromkeys(vision, "vision.safetensors") | {"language_model.x": "text.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    asked: list[tuple[str, str, str | None]] = []

    def hub(repository: str, name: str, *, revision: str | None, cache_dir: str | None) -> str:
        asked.append((repository, name, revision))
        if not (tmp_path / name).exists():
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    weights = weights_of("someone/llava", revision="v1")
    assert weights.keys() == weights_of(str(checkpoint)).keys()
    assert sum(name.startswith("projector.") for name in weights) == 4
    assert asked == [
        ("someone/llava", "model.safetensors.index.json", "v1"),
        ("someone/llava", "vision.safetensors", "v1"),
    ]
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        weights_of("someone/llava")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(checkpoint: Path, encoder: VisionEncoder, dtype: torch.dtype) -> None:
    config = LlavaConfig.from_pretrained(checkpoint)
    lower = VisionEncoder.load(config, str(checkpoint), device=torch.device("cpu"), dtype=dtype)
    output, exact = lower.encode(items(pixels(1)))[0], encoder.encode(items(pixels(1)))[0]
    assert output.patches.dtype == dtype
    got, expected = projected(lower, output), projected(encoder, exact)
    assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_random_weights_stand_in_for_dummy_ones(checkpoint: Path) -> None:
    config = LlavaConfig.from_pretrained(checkpoint)
    cpu = torch.device("cpu")
    dummy = VisionEncoder.load(config, "nowhere", device=cpu, dtype=torch.float32, dummy=True)
    assert dummy.encode(items(pixels(1)))[0].patches.isfinite().all()
