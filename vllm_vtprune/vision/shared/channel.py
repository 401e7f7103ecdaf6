# SPDX-License-Identifier: Apache-2.0
"""Messages with tensors between processes of one machine: text over a Unix socket, tensors in shared memory.

The tensors of a message lie in one anonymous file (`memfd_create`), whose descriptor goes along
(`socket.send_fds`). The receiver maps it and copies nothing; the kernel frees it with its last user, so a
process that dies at any moment leaves nothing behind, which named segments would.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

import msgspec
import torch
from torch import Tensor

from vllm_vtprune.families.base import Item, Kept, TowerOutput, View

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 64
#: Whether this system has what it takes.
SUPPORTED = hasattr(os, "memfd_create") and hasattr(socket, "AF_UNIX")


def send(channel: socket.socket, message: Any, tensors: Sequence[Tensor] = ()) -> None:
    """Send a message, of msgpack's types, and tensors on any device.

    Raises:
        OSError: the other side is gone.
    """
    where: list[tuple[str, list[int], int]] = []
    size = 0
    for tensor in tensors:
        where.append((str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    payload = msgspec.msgpack.encode({"message": message, "tensors": where, "size": size})
    memory = _shared(tensors, where, size) if size else None
    try:
        head = _LENGTH.pack(len(payload))
        socket.send_fds(channel, [head], [] if memory is None else [memory])
        channel.sendall(payload)
    finally:
        if memory is not None:
            os.close(memory)


def receive(channel: socket.socket) -> tuple[Any, list[Tensor]]:
    """The next message, and its tensors, which share memory and are the receiver's to change.

    Raises:
        EOFError: the other side has gone.
        OSError: likewise, in the middle of a message.
    """
    head, descriptors, _, _ = socket.recv_fds(channel, _LENGTH.size, 1)
    try:
        if not head:
            raise EOFError("the other side has gone")
        head += _exactly(channel, _LENGTH.size - len(head))
        found = msgspec.msgpack.decode(_exactly(channel, _LENGTH.unpack(head)[0]))
        memory = torch.empty(0, dtype=torch.uint8)
        if found["size"]:
            memory = torch.frombuffer(mmap.mmap(descriptors[0], found["size"]), dtype=torch.uint8)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    return found["message"], [_view(memory, *place) for place in found["tensors"]]


def _shared(tensors: Sequence[Tensor], where: Sequence[tuple[str, list[int], int]], size: int) -> int:
    descriptor = os.memfd_create("vtprune")
    os.ftruncate(descriptor, size)
    memory = torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    for tensor, place in zip(tensors, where, strict=True):
        _view(memory, *place).copy_(tensor)
    return descriptor


def _view(memory: Tensor, dtype: str, shape: Sequence[int], start: int) -> Tensor:
    kind = cast(torch.dtype, getattr(torch, dtype))
    count = int(torch.Size(shape).numel()) * kind.itemsize
    if not count:
        return torch.empty(list(shape), dtype=kind)
    return memory[start : start + count].view(kind).view(list(shape))


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(size - len(parts))
        if not part:
            raise EOFError("the other side has gone in the middle of a message")
        parts += part
    return bytes(parts)


# What goes over it: each becomes a message of msgpack's types, in which a tensor is its number.


def pack_item(item: Item, tensors: list[Tensor]) -> dict[str, Any]:
    """An image."""
    return {
        "inputs": _pack_named(item.inputs, tensors),
        "on_host": _pack_named(item.on_host, tensors),
        "places": item.places,
        "modality": item.modality,
    }


def unpack_item(packed: Mapping[str, Any], tensors: Sequence[Tensor]) -> Item:
    """Inverse of `pack_item`."""
    return Item(
        _unpack_named(packed["inputs"], tensors),
        _unpack_named(packed["on_host"], tensors),
        packed["places"],
        packed["modality"],
    )


def pack_output(output: TowerOutput, tensors: list[Tensor]) -> dict[str, Any]:
    """What the tower computed of an image."""
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    named = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return {
        "named": _pack_named(named, tensors),
        "on_host": _pack_named(output.on_host, tensors),
        "views": [[*view.grid, view.start] for view in output.views],
        "places": output.places,
        "modality": output.modality,
    }


def unpack_output(packed: Mapping[str, Any], tensors: Sequence[Tensor]) -> TowerOutput:
    """Inverse of `pack_output`."""
    return TowerOutput(
        views=tuple(View((rows, columns), start) for rows, columns, start in packed["views"]),
        on_host=_unpack_named(packed["on_host"], tensors),
        places=packed["places"],
        modality=packed["modality"],
        **_unpack_named(packed["named"], tensors),
    )


def pack_kept(kept: Kept, tensors: list[Tensor]) -> dict[str, Any]:
    """What stays of an image, as `Family.project` looks at it: of the units that leave, their number."""
    given = {"units": kept.units, "tokens": kept.tokens}
    if kept.output.cls is not None:
        given["cls"] = kept.output.cls
    return {
        "named": _pack_named(given, tensors),
        "on_host": _pack_named(kept.output.on_host, tensors),
        "count": kept.output.patches.shape[0],
        "places": kept.output.places,
        "modality": kept.output.modality,
    }


def unpack_kept(packed: Mapping[str, Any], tensors: Sequence[Tensor], device: torch.device) -> Kept:
    """Inverse of `pack_kept`, on the tower's device."""
    named = {name: tensor.to(device) for name, tensor in _unpack_named(packed["named"], tensors).items()}
    output = TowerOutput(
        patches=named["tokens"].new_empty((packed["count"], 0)),
        cls=named.get("cls"),
        on_host=_unpack_named(packed["on_host"], tensors),
        places=packed["places"],
        modality=packed["modality"],
    )
    return Kept(output, named["units"], named["tokens"])


def _pack_named(named: Mapping[str, Tensor], tensors: list[Tensor]) -> dict[str, int]:
    numbers = {}
    for name, tensor in named.items():
        numbers[name] = len(tensors)
        tensors.append(tensor)
    return numbers


def _unpack_named(numbers: Mapping[str, int], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {name: tensors[number] for name, number in numbers.items()}
