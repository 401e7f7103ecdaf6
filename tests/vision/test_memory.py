# SPDX-License-Identifier: Apache-2.0
"""What towers take of a GPU, computed and, on the CPU, measured; and what happens when it is not enough."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from vllm.multimodal import gpu_ipc_memory

from tests.conftest import DEMO_MODEL
from tests.helpers.checkpoint_tiles import internvl_chat
from tests.helpers.kv_config import config
from tests.helpers.public_configs import PUBLIC, llava_1_5_7b, qwen2_5_vl_7b, qwen3_vl_8b
from tests.helpers.recorded_passes import Recorder
from vllm_vtprune.families.base import OPTIONAL_OUTPUTS, Family, Item, Kept, TowerOutput
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.policy import PrunePolicy
from vllm_vtprune.vision.captured import CapturedPass, Graphs
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.feature_cache import FeatureCache
from vllm_vtprune.vision.features import everything
from vllm_vtprune.vision.gpu_budget import pixels_of, place_tower, restore_video_pool
from vllm_vtprune.vision.memory import (
    GIB,
    VIDEO_PATCHES,
    WORKSPACE_BYTES,
    TowerShape,
    device_index,
    most_on_one_device,
    tower_memory,
)
from vllm_vtprune.vision.service import VisionService
from vllm_vtprune.vision.transfer import held_bytes, output_on, outputs_on_host, to_device, to_host
from vtprune_server import memory as command

# --- the sums -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
def test_the_command_counts_a_public_checkpoint_from_its_config_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, billions = PUBLIC[name]
    make().save_pretrained(tmp_path)
    assert command._language_parameters(make(), 0) == pytest.approx(billions * 1e9, rel=0.01)
    assert command.main([str(tmp_path / "config.json"), "--gpu-memory-gb", "24,48,80"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.lstrip().startswith(("24 GiB", "48 GiB", "80 GiB"))]
    assert len(rows) == 6
    for row in rows:
        numbers = row.replace("GiB", "").replace(": does not fit", "").split()
        card, budget, _, towers, language, left = map(float, numbers)
        assert budget == pytest.approx(0.92 * card, abs=0.06)
        assert left == pytest.approx(budget - towers - language, abs=0.16)
        assert ("does not fit" in row) is (left <= 0)


def test_the_command_counts_what_brings_its_configuration_class_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """InternVL's chat format: the same sizes as its twin's in transformers' format, but for the projector."""
    folder = internvl_chat(tmp_path / "chat")
    assert command.main([str(folder), "--gpu-memory-gb", "24"]) == 2
    assert "brings code of its own" in capsys.readouterr().err
    counts = []
    for one in (folder, folder / "hf"):
        config = command._configuration(str(one), True)
        shape = TowerShape.of(family_of(config), None, videos=True)
        counts.append(command._language_parameters(config, shape.parameters))
    assert counts[0] == counts[1]
    assert command.main([str(folder), "--gpu-memory-gb", "24", "--trust-remote-code"]) == 0
    assert "24 GiB" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = llava_1_5_7b()
    made.architectures = ["PixtralForConditionalGeneration"]
    made.save_pretrained(tmp_path)
    assert command.main([str(tmp_path)]) == 2
    assert "vtprune prunes no PixtralForConditionalGeneration" in capsys.readouterr().err


def test_a_sum_is_processes_times_its_parts() -> None:
    shape = TowerShape.of(family_of(llava_1_5_7b()))
    one = tower_memory(shape, processes=1, batch=16, bytes_per_value=2)
    three = tower_memory(shape, processes=3, batch=16, bytes_per_value=2, cache_bytes=GIB)
    assert one.weights == 2 * shape.parameters and 311e6 < shape.parameters < 313e6
    assert three.total == 3 * (one.per_process + GIB)
    assert f"{three.total / GIB:.2f} GiB = 3 x (context 0.50 + weights 0.58" in str(three)
    assert tower_memory(shape, processes=1, batch=4, bytes_per_value=2).largest_pass < one.largest_pass / 3


def test_the_largest_pass_follows_the_batches_that_the_service_makes() -> None:
    fixed = TowerShape.of(family_of(llava_1_5_7b()))
    assert (fixed.layers, fixed.pass_patches(16), fixed.pass_patches(1)) == (23, 16 * 577, 577)
    any_size = TowerShape.of(family_of(qwen2_5_vl_7b()), image_pixels=14 * 14 * 2000)
    assert any_size.layers == 32
    assert any_size.pass_patches(16) == 16 * 1024 and any_size.pass_patches(1) == 2000
    films = TowerShape.of(family_of(qwen2_5_vl_7b()), image_pixels=14 * 14 * 2000, videos=True)
    assert films.pass_patches(16) == films.pass_patches(1) == VIDEO_PATCHES == 16 * 1024
    # the size with which the checkpoint is published: one picture is more than a batch
    assert TowerShape.of(family_of(qwen2_5_vl_7b())).pass_patches(16) == 65536


def _peak(run: Callable[[], object]) -> int:
    """Most bytes that a call holds at once, beyond what was there before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def _small(make: Callable[[], Any]) -> Any:
    """The same structure, a fraction of the size."""
    made = make()
    vision = made.vision_config
    vision.hidden_size, vision.intermediate_size = vision.hidden_size // 4, vision.intermediate_size // 4
    for name, value in {"num_attention_heads": 4, "num_heads": 4}.items():
        if hasattr(vision, name):
            setattr(vision, name, value)
    if hasattr(vision, "depth"):
        vision.depth = 4
        made.get_text_config().hidden_size = vision.out_hidden_size = vision.out_hidden_size // 4
    else:
        vision.num_hidden_layers, vision.image_size = 6, 112
        made.get_text_config().hidden_size = 1024
    if hasattr(vision, "fullatt_block_indexes"):
        vision.fullatt_block_indexes = [1, 3]
    if hasattr(vision, "deepstack_visual_indexes"):
        vision.deepstack_visual_indexes = [0, 1, 2]
    return made


@pytest.mark.parametrize("make", [llava_1_5_7b, qwen2_5_vl_7b, qwen3_vl_8b])
def test_a_pass_holds_no_more_than_was_computed(make: Callable[[], Any]) -> None:
    """The interpreter's own pass, as on a GPU; on the CPU it is measured byte by byte."""
    family: Family = family_of(_small(make))
    torch.manual_seed(0)
    encoder = VisionEncoder(family, family.build(), torch.device("cpu"), torch.float32)
    if family.places() is not None:
        items = [Item({"pixel_values": torch.randn(3, 112, 112)}, places=64) for _ in range(4)]
        shape, batch = TowerShape.of(family), 4
    else:
        side = family.config.vision_config.patch_size
        grid = torch.tensor([1, 16, 32])
        items = [Item({"pixel_values": torch.randn(512, 6 * side**2), "image_grid_thw": grid}, places=128)]
        shape, batch = TowerShape.of(family, image_pixels=512 * side**2), 0
    computed = shape.pass_bytes(batch, 4)
    everything_wanted = OPTIONAL_OUTPUTS & family.outputs

    def run() -> None:
        outputs = encoder.encode(items, everything_wanted)
        encoder.project([everything(output) for output in outputs])

    measured = _peak(run)
    assert measured <= computed < 2.5 * measured


def test_captured_passes_are_counted_where_there_are_such() -> None:
    fixed = TowerShape.of(family_of(llava_1_5_7b()))
    one, without = (
        tower_memory(fixed, processes=1, batch=16, bytes_per_value=2, graphs=graphs)
        for graphs in (True, False)
    )
    assert one.graphs > 0 == without.graphs and one.total - without.total == one.graphs
    assert "+ graphs 0.5" in str(one)
    assert fixed.graph_bytes(4, 2) < one.graphs / 3
    any_size = TowerShape.of(family_of(qwen2_5_vl_7b()))
    assert tower_memory(any_size, processes=1, batch=16, bytes_per_value=2).graphs == 0


def test_captured_passes_hold_no_more_than_was_computed() -> None:
    """Input, results and what one pass takes at its peak, which is what the pool of the graphs is."""
    family: Any = family_of(_small(llava_1_5_7b))
    torch.manual_seed(0)
    encoder = VisionEncoder(family, family.build(), torch.device("cpu"), torch.float32)
    (outputs,) = family.usual_outputs()

    def run(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return family._fixed._pass(encoder.modules["tower"], outputs, pixels)  # type: ignore[no-any-return]

    with torch.inference_mode():
        captured = CapturedPass(run, torch.zeros(1, 3, 112, 112), Graphs(4, Recorder()))
        held = captured._input.nbytes + sum(result.nbytes for result in captured._results)
        computed = TowerShape.of(family).graph_bytes(4, 4) - WORKSPACE_BYTES
        measured = held + _peak(lambda: run(captured._input))
    assert measured <= computed < 2.5 * measured


# --- which GPU ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({"devices": 1}, [0, 0, 0, 0]),
        ({"devices": 4, "per_replica": 4}, [0, 1, 2, 3]),
        ({"devices": 8, "replicas": 4, "per_replica": 2}, [0, 2, 4, 6]),
        ({"devices": 8, "replicas": 2, "per_replica": 2}, [0, 2, 1, 3]),
        ({"devices": 8, "per_replica": 2, "first": 6}, [6, 7, 6, 7]),
    ],
)
def test_api_processes_go_round_the_gpus_of_their_ranks(layout: dict[str, int], expected: list[int]) -> None:
    assert [device_index(rank, **layout) for rank in range(4)] == expected
    assert device_index(-1, **layout) == expected[0]
    assert most_on_one_device(4, **layout) == max(map(expected.count, expected))


def _placed(monkeypatch: pytest.MonkeyPatch, gpus: int, policy: dict[str, Any], **arguments: Any) -> Any:
    built = config(DEMO_MODEL)
    # what vLLM sets on the CPU
    built.cache_config.kv_cache_memory_bytes = None
    for name, value in arguments.items():
        setattr(built.parallel_config, name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    family = family_of(built.model_config.hf_config)
    given = PrunePolicy(**policy)
    device = torch.device(given.encoder_device if given.encoder_device != "auto" else "cuda")
    return built, place_tower(built, given, family, device, torch.float16)


@pytest.mark.parametrize("processes,gpus,towers", [(1, 1, 1), (2, 1, 2), (8, 8, 1), (3, 2, 2)])
def test_vllm_takes_the_towers_off_the_kv_cache(
    monkeypatch: pytest.MonkeyPatch, processes: int, gpus: int, towers: int
) -> None:
    built, place = _placed(monkeypatch, gpus, {}, _api_process_count=processes, data_parallel_size_local=gpus)
    assert place.device == "cuda:0" and place.memory.processes == towers
    left = gpu_ipc_memory.reserve_mm_ipc_gpu_memory(
        20 * GIB, built.model_config.get_multimodal_config(), processes
    )
    assert 20 * GIB - left == pytest.approx(place.memory.total, abs=2)


def test_an_api_process_takes_its_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"_api_process_count": 4, "_api_process_rank": 3, "data_parallel_size_local": 4}
    _, place = _placed(monkeypatch, 4, {}, **arguments)
    assert place.device == "cuda:3"
    _, named = _placed(monkeypatch, 4, {"encoder_device": "cuda:1"}, **arguments)
    assert named.device == "cuda:1" and named.memory.processes == 4


def test_a_shared_tower_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"_api_process_count": 4}
    _, own = _placed(monkeypatch, 1, {}, **arguments)
    _, shared = _placed(monkeypatch, 1, {"tower": "shared"}, **arguments)
    assert (own.memory.processes, shared.memory.processes) == (4, 1)
    assert shared.memory.weights == own.memory.weights
    # selection is the API processes', and on the CPU
    assert shared.memory.workspaces == own.memory.workspaces / 2
    assert shared.memory.total < own.memory.total / 4


def test_the_cache_counts_only_where_it_takes_the_gpus_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _, host = _placed(monkeypatch, 1, {})
    _, device = _placed(monkeypatch, 1, {"feature_cache_on": "device", "feature_cache_gb": 0.5})
    assert host.memory.cache == 0 and device.memory.total - host.memory.total == GIB // 2


def test_graphs_that_are_switched_off_take_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, on = _placed(monkeypatch, 1, {})
    _, off = _placed(monkeypatch, 1, {"encoder_graphs": False})
    assert off.memory.graphs == 0 < on.memory.graphs == on.memory.total - off.memory.total


def test_a_tower_on_the_cpu_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    built, place = _placed(monkeypatch, 1, {"encoder_device": "cpu"})
    assert (place.device, place.memory) == ("cpu", None)
    assert built.model_config.get_multimodal_config().mm_ipc_gpu_memory_gb == 0


def test_a_kv_cache_of_a_set_size_stays_as_it_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    built = config(DEMO_MODEL)
    built.cache_config.kv_cache_memory_bytes = GIB
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    family = family_of(built.model_config.hf_config)
    place_tower(built, PrunePolicy(), family, torch.device("cuda"), torch.float16)
    assert built.model_config.get_multimodal_config().mm_ipc_gpu_memory_gb == 0


def test_vllms_pool_for_videos_keeps_the_operators_size(monkeypatch: pytest.MonkeyPatch) -> None:
    built, place = _placed(monkeypatch, 1, {}, _api_process_count=2)
    try:
        gpu_ipc_memory.maybe_init_mm_gpu_ipc_pool(
            built.model_config.get_multimodal_config().mm_ipc_gpu_memory_gb, 2
        )
        restore_video_pool(built.model_config, built.parallel_config, place.video_gpu_gb)
        assert gpu_ipc_memory.get_mm_gpu_ipc_pool() is None
        restore_video_pool(built.model_config, built.parallel_config, 1.0)
        pool = gpu_ipc_memory.get_mm_gpu_ipc_pool()
        assert pool is not None and pool.total_bytes == GIB // 2
    finally:
        gpu_ipc_memory.set_mm_gpu_ipc_pool(None)


def test_the_largest_picture_is_read_as_image_processors_write_it() -> None:
    assert pixels_of({"max_pixels": 5}) == 5
    assert pixels_of({"size": {"longest_edge": 7, "shortest_edge": 1}}) == 7
    assert pixels_of({"size": {"height": 336, "width": 336}}) is None and pixels_of(None) is None


# --- when it is not enough ----------------------------------------------------------------------------------


class SmallEncoder:
    """A tower whose device holds so many patches at once."""

    device = torch.device("cpu")

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.passes: list[int] = []
        self.projected: list[int] = []

    def work(self, _: Item) -> int:
        return 1

    def patches(self, item: Item) -> int:
        return int(item.inputs["patches"])

    def encode(self, images: list[Item], outputs: frozenset[str]) -> list[TowerOutput]:
        if sum(self.patches(image) for image in images) > self.fits:
            raise torch.OutOfMemoryError("out of memory")
        self.passes.append(len(images))
        return [TowerOutput(patches=image.inputs["value"].reshape(1, 1)) for image in images]

    def project(self, images: list[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if len(images) > self.fits:
            raise torch.OutOfMemoryError("out of memory")
        self.projected.append(len(images))
        return [(kept.tokens, kept.units) for kept in images]


def _items(count: int, patches: list[int] | None = None) -> Callable[[list[int]], list[Item]]:
    sizes = patches or [1] * count
    return lambda positions: [
        Item({"value": torch.tensor([float(i)]), "patches": torch.tensor(sizes[i])}) for i in positions
    ]


def test_a_pass_that_does_not_fit_runs_in_smaller_ones() -> None:
    encoder = SmallEncoder(fits=3)
    tower = VisionService(encoder, FeatureCache(1 << 20))  # type: ignore[arg-type]
    keys = [f"k{i}" for i in range(16)]
    assert [float(o.patches) for o in tower.encode(keys, _items(16))] == list(range(16))
    assert sum(encoder.passes) == 16 and max(encoder.passes) <= 3


def test_batches_stay_small_after_a_pass_that_did_not_fit_and_grow_again() -> None:
    encoder = SmallEncoder(fits=8)
    tower = VisionService(encoder, FeatureCache(0))  # type: ignore[arg-type]
    tower.encode([f"a{i}" for i in range(16)], _items(16))
    encoder.fits, encoder.passes = 100, []
    tower.encode([f"b{i}" for i in range(64)], _items(64))
    assert encoder.passes == [10, 11, 12, 13, 14, 4]


def test_a_picture_that_fits_nowhere_fails_alone() -> None:
    encoder = SmallEncoder(fits=4)
    tower = VisionService(encoder, FeatureCache(1 << 20))  # type: ignore[arg-type]
    keys, prepare = ["k0", "k1", "k2"], _items(3, [1, 9, 1])
    with pytest.raises(torch.OutOfMemoryError):
        tower.encode(keys, prepare)
    assert [float(o.patches) for o in tower.encode(["k0", "k2"], _items(0))] == [0, 2]


@pytest.mark.parametrize("on_host", [False, True])
def test_a_cache_on_the_device_makes_room(on_host: bool) -> None:
    encoder = SmallEncoder(fits=4)
    tower = VisionService(encoder, FeatureCache(1 << 20), cache_on_host=on_host)  # type: ignore[arg-type]
    tower.encode(["old"], _items(1))
    tower.encode([f"k{i}" for i in range(6)], _items(6))
    assert (tower.cache.get("old") is not None) is on_host


def test_projection_that_does_not_fit_runs_image_by_image() -> None:
    encoder = SmallEncoder(fits=1)
    tower = VisionService(encoder, FeatureCache(0))  # type: ignore[arg-type]
    kept = [everything(output) for output in tower.encode(["a", "b"], _items(2))]
    assert [float(e) for e, _ in tower.project(kept)] == [0, 1]
    assert encoder.projected == [1, 1]


def test_a_concurrent_caller_is_not_lost_when_memory_runs_out() -> None:
    encoder = SmallEncoder(fits=2)
    tower = VisionService(encoder, FeatureCache(0))  # type: ignore[arg-type]
    got: dict[str, float] = {}

    def ask(i: int) -> None:
        prepare = lambda _: _items(i + 1)([i])  # noqa: E731
        got[f"k{i}"] = float(tower.encode([f"k{i}"], prepare)[0].patches)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert got == {f"k{i}": float(i) for i in range(12)}


def test_one_thread_computes_where_the_tower_has_its_own() -> None:
    threads: set[str] = set()

    class Encoder(SmallEncoder):
        def encode(self, images: list[Item], outputs: frozenset[str]) -> list[TowerOutput]:
            threads.add(threading.current_thread().name)
            return super().encode(images, outputs)

        def project(self, images: list[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
            threads.add(threading.current_thread().name)
            return super().project(images)

    tower = VisionService(Encoder(fits=2), FeatureCache(0), own_thread=True)  # type: ignore[arg-type]
    (kept,) = (everything(output) for output in tower.encode(["a"], _items(1)))
    callers = [threading.Thread(target=tower.project, args=([kept],)) for _ in range(3)]
    callers += [
        threading.Thread(target=tower.encode, args=([f"k{i}"], lambda _: _items(1)([0]))) for i in range(3)
    ]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(20)
    assert len(threads) == 1 and threads.pop().startswith("vtprune-tower")
    with pytest.raises(torch.OutOfMemoryError):
        tower.encode(["b"], lambda _: _items(1, [9])([0]))


# --- copies -------------------------------------------------------------------------------------------------


def test_no_image_keeps_the_memory_of_its_batch() -> None:
    batch = torch.arange(600.0).view(60, 10)
    parts = to_host(batch.split([10, 20, 30]))
    assert [part.untyped_storage().nbytes() for part in parts] == [400, 800, 1200]
    assert torch.equal(torch.cat(parts), batch)
    assert [part.dtype for part in to_host(batch.split(30), torch.float16)] == [torch.float16] * 2


def test_what_is_alone_in_its_memory_is_not_copied_unless_it_is_lent() -> None:
    alone = torch.arange(12.0).view(3, 4)
    (given,) = to_host([alone])
    assert given is alone
    (copied,) = to_host([alone], lent=[alone])
    assert torch.equal(copied, alone) and copied.data_ptr() != alone.data_ptr()
    (part,) = to_host([alone[:2]])
    assert torch.equal(part, alone[:2]) and part.untyped_storage().nbytes() == part.nbytes


def test_an_output_goes_to_the_host_in_one_allocation_and_back_as_it_was() -> None:
    output = TowerOutput(
        patches=torch.randn(5, 3, dtype=torch.float16),
        received=torch.randn(1, 5),
        keys=torch.randn(5, 7, dtype=torch.bfloat16),
        places=5,
    )
    (copy,) = outputs_on_host([output], pinned=False)
    assert len({t.untyped_storage().data_ptr() for t in (copy.patches, copy.received, copy.keys)}) == 1  # type: ignore[union-attr]
    back = output_on(copy, torch.device("cpu"))
    for name in ("patches", "received", "keys"):
        assert torch.equal(getattr(back, name), getattr(output, name))
    assert back.cls is None and back.places == 5


def test_pinned_memory_is_counted_as_torch_gives_it() -> None:
    output = TowerOutput(patches=torch.zeros(100, dtype=torch.uint8))
    assert (held_bytes(output, pinned=False), held_bytes(output, pinned=True)) == (100, 128)
    cache = FeatureCache(200, pinned=True)
    cache.put("a", output)
    cache.put("b", output)
    assert cache.get("a") is None and cache.nbytes == 128


def test_inputs_take_the_towers_precision_and_whole_numbers_keep_theirs() -> None:
    item = Item({"pixel_values": torch.ones(2, 3), "image_grid_thw": torch.tensor([1, 2, 3])})
    (moved,) = to_device([item], torch.device("cpu"), torch.bfloat16)
    assert moved.inputs["pixel_values"].dtype == torch.bfloat16
    assert moved.inputs["image_grid_thw"].dtype == torch.int64
