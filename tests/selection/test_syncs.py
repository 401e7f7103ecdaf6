# SPDX-License-Identifier: Apache-2.0
"""A selection waits for the device once: on the CPU by what would wait, on a GPU by CUDA's own count."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.selection_cases import OPTIONAL, batch, budgets, every_method, image
from vllm_vtprune.selection import get_method
from vllm_vtprune.settings import VisionSettings


class HostTraffic(TorchDispatchMode):
    """Counts what makes a host wait for a device: values read, shapes from data, copies of host data."""

    WAITS = frozenset(
        {
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::masked_select",
            "aten::unique_dim",
            "aten::_unique2",
            "aten::repeat_interleave.Tensor",
            "aten::lift_fresh",
            "aten::scalar_tensor",
            "aten::equal",
        }
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator = str(func.name())
        if operator in self.WAITS:
            self.seen[operator] += 1
        if operator.startswith("aten::index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if isinstance(args[1], (list, tuple)) else ())
        ):
            self.seen["boolean index"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_traffic(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts waits; `tolist` and its like do not reach the dispatcher on the CPU, so they are wrapped."""
    mode = HostTraffic()

    def counting(reader: str) -> Any:
        original = getattr(Tensor, reader)

        def wrapper(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            mode.seen[reader] += 1
            return original(self, *args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch, mode:
        for reader in ("tolist", "numpy", "cpu", "__array__"):
            patch.setattr(Tensor, reader, counting(reader))
        yield mode.seen


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[0].item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x * torch.tensor([2.0]),
        lambda x: torch.where(x > 0, x, 1.0),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_counter_of_waits_counts(wait: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with host_traffic(monkeypatch) as seen:
        wait(torch.ones(3))
    assert seen.total() >= 1


@every_method
@budgets
def test_a_selection_waits_for_the_device_once(
    name: str, budget: VisionSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = batch([image(seed) for seed in range(4)])
    with host_traffic(monkeypatch) as seen:
        get_method(name).select(features, budget)
    assert seen == Counter({"tolist": 1})


@every_method
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_that_a_selection_waits_once(name: str) -> None:
    features = batch([image(seed) for seed in range(4)])
    moved = {field: getattr(features, field).cuda() for field in ("patches", *OPTIONAL)}
    on_device = dataclasses.replace(features, **moved)
    method = get_method(name)
    method.select(on_device, VisionSettings(aggressiveness=0.5))  # warm-up: handles and workspaces
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing CUDA operation") as caught:
            selections = method.select(on_device, VisionSettings(aggressiveness=0.5))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchronizing" in str(warning.message)]) == 1
    for one, other in zip(
        selections, method.select(features, VisionSettings(aggressiveness=0.5)), strict=True
    ):
        assert one.count == other.count
