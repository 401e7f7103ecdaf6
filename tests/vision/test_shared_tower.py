# SPDX-License-Identifier: Apache-2.0
"""A tower in a process of its own: what comes over the channel, who meets whose images, and what dies."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaConfig

from tests.conftest import DEMO_MODEL
from tests.vision.test_memory import SmallEncoder
from vllm_vtprune.errors import TowerLostError
from vllm_vtprune.families.base import Item, Kept, TowerOutput, View
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.feature_cache import FeatureCache
from vllm_vtprune.vision.features import everything
from vllm_vtprune.vision.service import VisionService
from vllm_vtprune.vision.shared import channel
from vllm_vtprune.vision.shared.client import SharedTower
from vllm_vtprune.vision.shared.process import Recipe, TowerProcess


def _over(message: Any, tensors: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        sender = threading.Thread(target=channel.send, args=(ours, message, tensors))
        sender.start()
        received = channel.receive(theirs)
        sender.join()
        return received


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_tensors_arrive_as_they_were(dtype: torch.dtype) -> None:
    tensors = [torch.randn(s).to(dtype) for s in [(3, 5), (1,), (0, 4), (2, 300, 1000)]]
    message, found = _over({"a": [1, "b"]}, [*tensors, torch.ones(2, 2).T])
    assert message == {"a": [1, "b"]}
    for was, now in zip([*tensors, torch.ones(2, 2)], found, strict=True):
        assert now.dtype == was.dtype and torch.equal(now, was)


def test_nothing_is_left_of_a_message() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        _, (tensor,) = _over({}, [torch.zeros(1000)])
        tensor += 1  # it is the receiver's
    del tensor
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1
    with pytest.raises(EOFError):
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        ours.close()
        channel.receive(theirs)


def test_outputs_and_what_is_kept_of_them_arrive_as_they_were() -> None:
    output = TowerOutput(
        patches=torch.randn(6, 4),
        views=(View((1, 2)), View((2, 2), 2)),
        cls=torch.randn(2, 4),
        received=torch.randn(1, 6),
        received_midway=torch.randn(1, 6),
        on_host={"image_sizes": torch.tensor([3, 4])},
        places=7,
    )
    tensors: list[torch.Tensor] = []
    found = channel.unpack_output(*_over(channel.pack_output(output, tensors), tensors))
    assert found.views == output.views and found.places == 7 and found.keys is None
    for name in ("patches", "cls", "received", "received_midway"):
        assert torch.equal(getattr(found, name), getattr(output, name))
    tensors = []
    kept = Kept(output, torch.tensor([1, 4]), output.patches[[1, 4]])
    message, sent = _over(channel.pack_kept(kept, tensors), tensors)
    there = channel.unpack_kept(message, sent, torch.device("cpu"))
    assert torch.equal(there.units, kept.units) and torch.equal(there.tokens, kept.tokens)
    assert there.output.patches.shape[0] == 6 and there.output.places == 7 and there.added == 0
    assert torch.equal(there.output.on_host["image_sizes"], output.on_host["image_sizes"])


# --- callers of several API processes, with the tower in a thread -------------------------------------------


class HeldEncoder(SmallEncoder):
    """A tower that waits until it is let go."""

    dtype = torch.float32

    def __init__(self, fits: int = 100) -> None:
        super().__init__(fits)
        self.go = threading.Event()
        self.go.set()

    def encode(self, images: list[Item], outputs: frozenset[str]) -> list[TowerOutput]:
        self.go.wait(20)
        return super().encode(images, outputs)


RECIPE = Recipe(None, "nowhere", {"device": torch.device("cpu"), "dtype": torch.float32}, 0, True, 16, 0)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[HeldEncoder, Callable[..., SharedTower]]]:
    encoder = HeldEncoder()

    def make(observer: Callable[[int, float], None]) -> VisionService:
        return VisionService(encoder, FeatureCache(1 << 20), observer=observer)  # type: ignore[arg-type]

    process = TowerProcess(make)
    thread = threading.Thread(target=process.listen, args=(tmp_path / "cpu.sock", 0.2), daemon=True)
    thread.start()
    while not (tmp_path / "cpu.sock").exists():
        time.sleep(0.01)
    clients: list[SharedTower] = []

    def client(**arguments: Any) -> SharedTower:
        clients.append(SharedTower(tmp_path, "cpu", RECIPE, **arguments))
        return clients[-1]

    yield encoder, client
    for one in clients:
        one._forget()
    thread.join(10)
    assert not thread.is_alive(), "a tower that nobody is connected to ends"


def _items(names: list[str], asked: list[int] | None = None) -> Callable[[list[int]], list[Item]]:
    def prepare(positions: list[int]) -> list[Item]:
        if asked is not None:
            asked.extend(positions)
        value = [torch.tensor([float(names[i][1:])]) for i in positions]
        return [Item({"value": v, "patches": torch.tensor(1)}) for v in value]

    return prepare


def test_callers_of_all_api_processes_share_passes_and_one_cache(held: Any) -> None:
    encoder, client = held
    first, second = client(), client(first=False)
    encoder.go.clear()
    got: dict[str, float] = {}

    def ask(tower: SharedTower, name: str) -> None:
        got[name] = float(tower.encode([name], _items([name]))[0].patches)

    threads = [threading.Thread(target=ask, args=((first, second)[i % 2], f"k{i}")) for i in range(9)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while first.available([f"k{i}" for i in range(9)]) < 9 and time.monotonic() < deadline:
        time.sleep(0.01)
    encoder.go.set()
    for thread in threads:
        thread.join(20)
    assert got == {f"k{i}": float(i) for i in range(9)}
    assert encoder.passes == [1, 8]
    asked: list[int] = []
    assert float(second.encode(["k0"], _items(["k0"], asked))[0].patches) == 0 and asked == []
    assert first.available(["k1", "k99"]) == 1
    assert first.cache.nbytes > 0 and second.cache.nbytes == 0


def test_each_pass_is_told_once_and_no_image_is_left_waiting(held: Any) -> None:
    _, client = held
    passes: list[int] = []
    waiting: list[int] = []
    towers = [client(), client()]
    for tower in towers:
        tower.observer = lambda images, _: passes.append(images)
        tower.waiting_observer = waiting.append
    for i, tower in enumerate(towers * 3):
        names = [f"k{i}", f"k{i + 10}", f"k{i}"]
        assert [float(o.patches) for o in tower.encode(names, _items(names))] == [i, i + 10, i]
    assert sum(passes) == 12 and sum(waiting) == 0 and max(waiting) == 3


def test_errors_keep_their_type_and_the_next_request_works(held: Any) -> None:
    encoder, client = held
    tower = client()
    encoder.fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        tower.encode(["k1"], _items(["k1"]))
    encoder.fits = 100
    with pytest.raises(ZeroDivisionError):
        tower.encode(["k2"], lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    (output,) = tower.encode(["k1"], _items(["k1"]))
    ((embeddings, places),) = tower.project([everything(output)])
    assert float(embeddings) == 1 and places.tolist() == [0]


def test_a_process_that_is_dying_and_still_takes_connections_has_died_once(tmp_path: Path) -> None:
    path = tmp_path / "cpu.sock"
    dying = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dying.bind(str(path))
    dying.listen()
    cut: list[int] = []

    def die() -> None:
        while len(cut) < 6:
            dying.accept()[0].close()
            cut.append(1)
        service = VisionService(HeldEncoder(), FeatureCache(1 << 20))  # type: ignore[arg-type]
        process = TowerProcess(lambda _: service)
        threading.Thread(target=process.listen, args=(path, 0.5), daemon=True).start()
        time.sleep(0.2)
        dying.close()

    threading.Thread(target=die, daemon=True).start()
    tower = SharedTower(tmp_path, "cpu", RECIPE)
    assert [float(o.patches) for o in tower.encode(["k4"], _items(["k4"]))] == [4] and len(cut) == 6
    tower._forget()


# --- a real process -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> VisionEncoder:
    config = LlavaConfig.from_pretrained(DEMO_MODEL)
    return VisionEncoder.load(config, str(DEMO_MODEL), device=torch.device("cpu"), dtype=torch.float32)


def test_a_process_that_is_killed_is_started_again_and_answers_the_same(
    demo: VisionEncoder, tmp_path: Path
) -> None:
    config = LlavaConfig.from_pretrained(DEMO_MODEL)
    load = {"device": torch.device("cpu"), "dtype": torch.float32}
    recipe = Recipe(config, str(DEMO_MODEL), load, 1 << 24, True, 16, 0)
    towers = [SharedTower(tmp_path, "cpu", recipe) for _ in range(2)]
    size = config.vision_config.image_size
    pixels = torch.randn(3, 3, size, size)
    places = demo.family.places() or 0

    def prepare(positions: list[int]) -> list[Item]:
        return [Item({"pixel_values": pixels[i]}, places=places) for i in positions]

    keys = ["a", "b", "c"]
    expected = demo.encode(prepare([0, 1, 2]), frozenset({"received"}))
    wanted = [e for e, _ in demo.project([everything(output) for output in expected])]
    assert towers[0].state() == {"pid": None, "restarts": 0}

    def check(tower: SharedTower) -> None:
        outputs = tower.encode(keys, prepare, frozenset({"received"}))
        for output, right in zip(outputs, expected, strict=True):
            assert torch.allclose(output.patches, right.patches, atol=1e-5)
            assert torch.allclose(output.received, right.received, atol=1e-6)  # type: ignore[arg-type]
        for (embeddings, _), right in zip(
            tower.project([everything(o) for o in outputs]), wanted, strict=True
        ):
            assert torch.allclose(embeddings, right, atol=1e-4)

    both = [threading.Thread(target=tower.revive) for tower in towers]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(120)
    first = towers[0].state()
    assert first["pid"] is not None and first == towers[1].state() and first["restarts"] == 0
    for tower in towers:
        check(tower)

    os.kill(first["pid"], signal.SIGKILL)
    check(towers[1])
    again = towers[1].state()
    assert again["pid"] not in (None, first["pid"]) and again["restarts"] == 1
    check(towers[0])
    assert towers[0].state() == again

    for tower in towers:
        tower._forget()
    os.kill(again["pid"], signal.SIGTERM)
    assert towers[0].state()["pid"] == again["pid"], "a server that stops finishes what it has accepted"
    towers[0]._forget()
    os.kill(again["pid"], signal.SIGKILL)


def test_a_process_that_ends_before_it_listens_is_an_error_and_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "false")
    tower = SharedTower(tmp_path, "cpu", RECIPE)
    with pytest.raises(TowerLostError, match="ended before it could serve"):
        tower.revive()
    assert tower.state()["pid"] is None
