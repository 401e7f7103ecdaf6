# SPDX-License-Identifier: Apache-2.0
"""Copies between the host and the tower's device: one transfer for a batch, and memory of its own per image.

A copy from or to ordinary host memory blocks the caller and the device alike, so batches go through pinned
memory, which torch's caching host allocator keeps for the next one. A view of a batch is never handed on: one
surviving image would keep the memory of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_vtprune.families.base import OPTIONAL_OUTPUTS, Item, TowerOutput

#: Where each tensor begins in a shared buffer: what any dtype's view needs.
_ALIGNMENT = 16
#: The tensors of a `TowerOutput` that are on the tower's device.
_ON_DEVICE = ("patches", "cls", *sorted(OPTIONAL_OUTPUTS))


def to_device(items: Sequence[Item], device: torch.device, dtype: torch.dtype) -> list[Item]:
    """Images on the tower's device, those that are floating point in its precision.

    The tensors share memory, which goes with the pass that they are for.
    """
    tensors = [tensor for item in items for tensor in item.inputs.values()]
    moved = iter(_uploaded(tensors, device) if device.type == "cuda" else tensors)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

    return [dataclasses.replace(item, inputs={k: cast(next(moved)) for k in item.inputs}) for item in items]


def to_host(
    tensors: Sequence[Tensor], dtype: torch.dtype | None = None, *, lent: Collection[Tensor] = ()
) -> list[Tensor]:
    """The tensors on the host, each in memory of its own, by one transfer.

    What lies on the host, has that type and is alone in its memory is given as it is.

    Args:
        tensors: of one dtype and device, alike in all but their first dimension.
        dtype: of the results; None: as they are.
        lent: others' tensors, in whose memory no result may lie.
    """
    if not tensors:
        return []
    if tensors[0].device.type != "cuda":
        others = {tensor.untyped_storage().data_ptr() for tensor in lent}
        return [_own(tensor.to("cpu", dtype or tensor.dtype), others) for tensor in tensors]
    batch = (torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]).to(dtype or tensors[0].dtype)
    staged = torch.empty(batch.shape, dtype=batch.dtype, pin_memory=True)
    staged.copy_(batch, non_blocking=True)
    wait_for(batch.device)
    return [part.clone() for part in staged.split([tensor.shape[0] for tensor in tensors])]


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what this thread had it do.

    By an event that sleeps: a stream's own `synchronize` keeps a core busy for as long as the GPU works.
    """
    done = torch.cuda.Event(blocking=True)
    done.record(torch.cuda.current_stream(device))
    done.synchronize()


def outputs_on_host(outputs: Sequence[TowerOutput], *, pinned: bool) -> list[TowerOutput]:
    """Copies of tower outputs on the host, each in one allocation of its own; waits once for all.

    Args:
        outputs: of one pass.
        pinned: in page-locked memory, from which copies do not block.
    """
    copies = [_host_copy(output, pinned) for output in outputs]
    device = outputs[0].patches.device if outputs else torch.device("cpu")
    if device.type == "cuda":
        wait_for(device)
    return copies


def output_on(output: TowerOutput, device: torch.device) -> TowerOutput:
    """A tower output on a device; the copies wait for nobody where it lies in pinned memory."""
    moved = {
        name: tensor.to(device, non_blocking=True)
        for name in _ON_DEVICE
        if (tensor := getattr(output, name)) is not None
    }
    return dataclasses.replace(output, **moved)


def held_bytes(output: TowerOutput, *, pinned: bool) -> int:
    """Bytes that an output takes in a cache: torch gives pinned memory in powers of two."""
    return 1 << (output.nbytes - 1).bit_length() if pinned and output.nbytes else output.nbytes


def _own(tensor: Tensor, others: Collection[int]) -> Tensor:
    storage = tensor.untyped_storage()
    alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in others
    return tensor if alone else tensor.clone()


def _host_copy(output: TowerOutput, pinned: bool) -> TowerOutput:
    tensors = {name: t for name in _ON_DEVICE if (t := getattr(output, name)) is not None}
    buffer = torch.empty(
        sum(_aligned(t.nbytes) for t in tensors.values()), dtype=torch.uint8, pin_memory=pinned
    )
    copies: dict[str, Any] = {}
    start = 0
    for name, tensor in tensors.items():
        copies[name] = _view(buffer, start, tensor).copy_(tensor, non_blocking=True)
        start += _aligned(tensor.nbytes)
    return dataclasses.replace(output, **copies)


def _uploaded(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors in one buffer on the device, by way of a pinned one."""
    staged = torch.empty(sum(_aligned(t.nbytes) for t in tensors), dtype=torch.uint8, pin_memory=True)
    start = 0
    for tensor in tensors:
        _view(staged, start, tensor).copy_(tensor)
        start += _aligned(tensor.nbytes)
    there, start = staged.to(device, non_blocking=True), 0
    views: list[Tensor] = []
    for tensor in tensors:
        views.append(_view(there, start, tensor))
        start += _aligned(tensor.nbytes)
    return views


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
