# SPDX-License-Identifier: Apache-2.0
"""Captured passes on the CPU: all but `torch.cuda.CUDAGraph` itself, for which `RecordedGraph` stands in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaConfig

from tests.helpers.checkpoints import random_llava
from tests.helpers.recorded_passes import RecordedGraph, Recorder
from vllm_vtprune.families.base import Item
from vllm_vtprune.vision.captured import CapturedPass, Graphs, agree
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.feature_cache import FeatureCache
from vllm_vtprune.vision.service import VisionService
from vllm_vtprune.vision.tower_pass import TowerPasses, TracedPass


class Tower:
    """Two results of a batch; remembers the batches it was run with."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        self.batches.append(len(pixels))
        return pixels * 2 + 1, pixels.sum((1, 2, 3))


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randn((count, 3, 4, 4), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 8, 16, 17, 64])
def test_sizes_end_at_the_largest_batch_and_pad_less_than_a_third_of_a_pass(largest: int) -> None:
    sizes = Graphs(largest, Recorder()).sizes
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == largest
    assert len(sizes) <= 2 * largest.bit_length()
    for count in range(1, largest + 1):
        size = next(s for s in sizes if s >= count)
        assert 3 * (size - count) < size


@pytest.mark.parametrize("count", [*range(1, 18), 33])
def test_a_batch_of_any_size_has_the_results_of_the_pass(count: int) -> None:
    tower, recorder = Tower(), Recorder()
    captured = CapturedPass(tower, pictures(1), Graphs(16, recorder))
    before, values = recorder.replays, pictures(count, seed=count)
    tower.batches.clear()
    found = captured(values)
    assert agree(found, Tower()(values)) and all(len(result) == count for result in found)
    assert recorder.replays - before == -(-count // 16)
    assert sum(tower.batches) >= count and set(tower.batches) <= set(Graphs(16, recorder).sizes)


def test_results_lie_in_memory_that_the_next_pass_does_not_write() -> None:
    recorder = Recorder()
    captured = CapturedPass(Tower(), pictures(1), Graphs(4, recorder))
    values = pictures(4)
    first = captured(values)
    kept = [result.clone() for result in first]
    captured(pictures(3, seed=7))
    assert all(torch.equal(now, then) for now, then in zip(first, kept, strict=True))
    fixed = {captured._input.untyped_storage().data_ptr()}
    fixed |= {result.untyped_storage().data_ptr() for result in captured._results}
    assert not fixed & {result.untyped_storage().data_ptr() for result in first}
    # what the caller does with its pictures afterwards changes nothing either
    values.zero_()
    assert all(torch.equal(now, then) for now, then in zip(first, kept, strict=True))


def test_the_largest_batch_is_captured_first() -> None:
    """The others find their memory in its pool."""
    tower, recorder, batches = Tower(), Recorder(), []

    def record(run: Callable[[], None], device: torch.device) -> RecordedGraph:
        tower.batches.clear()
        graph = recorder(run, device)
        batches.extend(tower.batches)
        return graph

    CapturedPass(tower, pictures(1), Graphs(8, record))
    assert batches == [8, 6, 4, 3, 2, 1]


def _wrong(run: Callable[[], None], device: torch.device) -> Any:
    """A graph that does nothing, so that its results are whatever was there."""
    return RecordedGraph(lambda: None)


def _refused(run: Callable[[], None], device: torch.device) -> Any:
    raise RuntimeError("operation not permitted when stream is capturing\nand many more lines")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (_wrong, "ValueError: a captured pass of 1 pictures gives other results"),
        (_refused, "RuntimeError: operation not permitted when stream is capturing"),
    ],
)
def test_what_cannot_be_captured_runs_without_and_says_so_in_one_line(
    record: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    tower, passes = Tower(), TowerPasses(lambda tower, outputs, values: tower(values))
    with caplog.at_level(logging.WARNING, logger="vllm_vtprune"):
        passes.prepare(tower, pictures(1), [frozenset()], Graphs(4, record))
    (line,) = [r.getMessage() for r in caplog.records]
    assert (
        line
        == f"vtprune: the vision tower could not be captured as CUDA graphs ({reason}) and runs without them."
    )
    assert isinstance(passes._passes[frozenset()], TracedPass)
    values = pictures(3)
    with torch.inference_mode():
        assert agree(passes(tower, values, frozenset()), Tower()(values))


def test_results_that_are_not_numbers_agree_with_nothing() -> None:
    nan = torch.full((2,), float("nan"))
    assert not agree([nan], [torch.ones(2)]) and not agree([torch.ones(2)], [nan])
    assert not agree([torch.ones(2)], [torch.ones(3)]) and not agree([torch.ones(2)], [])
    assert agree([torch.ones(2)], [torch.ones(2) * 1.0001]) and not agree(
        [torch.ones(2)], [torch.ones(2) * 1.01]
    )


def test_several_threads_get_the_answers_of_their_own_pictures(tmp_path: Path) -> None:
    """Through the service, whose passes hold several callers' pictures and one's in several passes."""
    folder = random_llava(tmp_path / "llava", image_size=56, layers=1, heads=2, kv_heads=2, hidden=64)
    config = LlavaConfig.from_pretrained(folder)
    where: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    plain, recorder = VisionEncoder.load(config, str(folder), **where), Recorder()
    captured = VisionEncoder.load(config, str(folder), graphs=4, record=recorder, **where)
    values = torch.randn((40, 3, 56, 56), generator=torch.Generator().manual_seed(1))
    expected = plain.encode([Item({"pixel_values": v}) for v in values])
    tower = VisionService(captured, FeatureCache(0), max_batch=7)
    before = recorder.replays

    def ask(caller: int) -> list[torch.Tensor]:
        mine = range(caller, 40, 8)
        outputs = tower.encode(
            [f"k{i}" for i in mine], lambda at: [Item({"pixel_values": values[mine[i]]}) for i in at]
        )
        return [output.patches for output in outputs]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert recorder.replays - before >= 40 / 7
    for caller, found in enumerate(answers):
        for i, patches in zip(range(caller, 40, 8), found, strict=True):
            assert torch.allclose(patches, expected[i].patches, atol=1e-5)
