# SPDX-License-Identifier: Apache-2.0
"""One engine step above one prune layer: what its geometry makes of prompts, slots and attention metadata.

`vllm_vtprune.kv_drop.geometry` says who loses tokens; `vllm_vtprune.kv_drop.bands` does so for several prune
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vllm_vtprune.kv_drop.geometry import RequestDrop, StepGeometry, step_geometry
from vllm_vtprune.kv_drop.ratings import Bucket, make_buckets
from vllm_vtprune.kv_drop.relevance import PrunedPrompts

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


_NOBODY: NDArray[np.int32] = np.zeros(0, dtype=np.int32)


class KVDropState(nn.Module):
    """What model, runner and metadata builders share in a worker: the present step.

    A CUDA graph of a decode-only batch replays whatever addresses it saw when captured; `dropped` and
    `seq_lens` are written in place for that reason. They are buffers of the model, though no checkpoint has
    them, since sleep mode (`vllm.v1.worker.gpu_worker.Worker.sleep`) gives back all device memory but that of
    the buffers, which it saves.

    Attributes:
        overrun: rows of the batch whose request holds too few blocks for what the step writes. Scheduler and
            worker then disagree on its prompt: it must fail, and nothing of it is written.
        gated: whether a gate may change the step midway.
        repeatable: whether this step's slots and metadata may have to be made again, once a gate has decided.
        built: while `repeatable`, what makes metadata again: the names of its layers, and the metadata.
    """

    dropped: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    requests: Tensor
    positions: Tensor

    def __init__(self, max_requests: int, max_tokens: int, device: torch.device) -> None:
        super().__init__()
        sizes = {
            "dropped": (max_requests, torch.int32),
            "seq_lens": (max_requests, torch.int32),
            "query_start_loc": (max_requests + 1, torch.int32),
            "requests": (max_tokens, torch.int64),
            "positions": (max_tokens, torch.int64),
        }
        with torch.inference_mode(False):
            for name, (size, dtype) in sizes.items():
                buffer = torch.zeros(size, dtype=dtype, device=device)
                self.register_buffer(name, buffer, persistent=False)
        self.device = device
        self.step: StepGeometry | None = None
        self.prompts: PrunedPrompts | None = None
        self.overrun: set[int] = set()
        self.gated = self.repeatable = False
        self.built: list[Callable[[], tuple[Sequence[str], Any]]] = []
        self._written: list[tuple[Tensor, int, Tensor, NDArray[np.int32] | None]] = []
        self._drops: Sequence[RequestDrop | None] = ()
        self._rows = self._ends = _NOBODY

    def expect_repeat(self, expected: bool) -> None:
        """Say before a step whether its slots and metadata may have to be made again."""
        self.repeatable = expected
        self.built, self._written = [], []

    def repeat(
        self,
        drops: Sequence[RequestDrop | None],
        scheduled: NDArray[np.int32],
        computed: NDArray[np.int32],
    ) -> dict[str, Any]:
        """Start the step again with what its requests lose by now: slots in place, metadata anew.

        Returns:
            The metadata by name of the layer.
        """
        self.repeatable = False
        self.begin(drops, scheduled, computed)
        for call in self._written:
            self.write_slots(*call)
        found: dict[str, Any] = {}
        for build in self.built:
            names, metadata = build()
            found |= dict.fromkeys(names, metadata)
        self.expect_repeat(False)
        return found

    def clear(self) -> None:
        """No request in the batch has lost tokens, as in vLLM's dummy runs."""
        if self.step is not None:
            self.dropped.zero_()
        self.step = None
        self.prompts = None
        self.overrun = set()
        self._drops = ()
        self._rows = self._ends = _NOBODY

    def begin(
        self,
        drops: Sequence[RequestDrop | None],
        scheduled: NDArray[np.int32],
        computed: NDArray[np.int32],
    ) -> None:
        """Start a step.

        Args:
            drops: per row of the batch, what its request loses; None where it loses nothing.
            scheduled: see `step_geometry`.
            computed: see `step_geometry`.
        """
        if not any(drops):
            self.clear()
            self._rows, self._ends = scheduled, computed + scheduled
            return
        self.overrun = set()
        last = self.step
        if last is not None and self._decodes_on(last, drops, scheduled, computed):
            # as nearly every step does; with a small model the geometry would be a tenth of its time
            positions = (computed - last.dropped).astype(np.int64)
            self.step = replace(last, positions=positions)
            self._rows, self._ends = scheduled, computed + scheduled - last.dropped
            self._copy(self.positions, positions)
            return
        dropped, lost = np.array([(d.dropped, d.lost) if d else (0, 0) for d in drops], dtype=np.int32).T
        step = self.step = step_geometry(scheduled, computed, dropped, lost)
        self._drops = drops
        self._rows, self._ends = np.diff(step.query_start_loc), computed + scheduled - dropped
        self.dropped.zero_()
        self._copy(self.dropped, dropped)
        self._copy(self.query_start_loc, step.query_start_loc)
        self._copy(self.requests, step.requests)
        self._copy(self.positions, step.positions)
        self.prompts = self._prompts(drops, step, scheduled, computed)

    def _decodes_on(
        self,
        last: StepGeometry,
        drops: Sequence[RequestDrop | None],
        scheduled: NDArray[np.int32],
        computed: NDArray[np.int32],
    ) -> bool:
        """Whether the last step's requests, in the same rows, each take one more token and none is pruned."""
        return (
            last.rows == len(drops) == len(self._drops)
            and not len(last.pruned)
            and self.prompts is None
            and all(now is before for now, before in zip(drops, self._drops, strict=True))
            and bool((scheduled == 1).all())
            # a preempted request begins again at its first token
            and bool(computed.all())
        )

    def write_slots(
        self, block_table: Tensor, block_size: int, slots: Tensor, blocks: NDArray[np.int32] | None
    ) -> None:
        """Write where the step's rows go above the prune layer, in place: a CUDA graph reads this buffer.

        Args:
            block_table: the group's, one row per request of the batch, [>= R, blocks].
            block_size: tokens of a block.
            slots: the group's slot mapping, [>= M]; -1 past the rows, which tells kernels to write nothing.
            blocks: how many blocks of its row each request holds, [>= R]; what lies beyond them in the row
                is another's. None in a dummy run, which writes nothing.
        """
        if self.repeatable:
            self._written.append((block_table, block_size, slots, blocks))
        if self.step is not None:
            self._write_places(block_table, block_size, slots)
        if blocks is None:
            return
        for index in np.flatnonzero(blocks[: len(self._ends)] * block_size < self._ends).tolist():
            end = int(self._rows[: index + 1].sum())
            slots[end - int(self._rows[index]) : end] = -1
            self.overrun.add(index)

    def _write_places(self, block_table: Tensor, block_size: int, slots: Tensor) -> None:
        assert self.step is not None
        n = self.step.rows
        positions = self.positions[:n]
        blocks = block_table[self.requests[:n], positions // block_size]
        slots[:n] = blocks.to(slots.dtype) * block_size + positions % block_size
        slots[n:] = -1

    def remember(self, rows: Tensor) -> None:
        """Note which positions stayed, for requests that are preempted and prefilled again.

        Args:
            rows: rows that stayed of the batch below the prune layer, [M].
        """
        step = self.step
        if step is None:
            return
        for index in step.pruned:
            drop = self._drops[index]
            if drop is not None and drop.kept is None:
                first = int(step.query_start_loc[index])
                drop.kept = rows[first : first + drop.tokens - drop.dropped], int(step.starts[index])

    def compact(self, metadata: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """The batch's metadata as the layers above see it; `metadata` itself is left alone."""
        n = metadata.num_reqs
        seq_lens = torch.sub(metadata.seq_lens, self.dropped[:n], out=self.seq_lens[:n])
        step = self.step
        if step is None:
            return replace(metadata, seq_lens=seq_lens)
        changes: dict[str, Any] = {"seq_lens": seq_lens, "_num_computed_tokens_cache": None}
        if metadata.seq_lens_cpu_upper_bound is not None:
            upper = metadata.seq_lens_cpu_upper_bound.clone()
            upper[: len(step.dropped)] -= torch.from_numpy(step.dropped)
            changes["seq_lens_cpu_upper_bound"] = upper
        if len(step.pruned):
            changes |= {
                "query_start_loc": self.query_start_loc[: n + 1],
                "query_start_loc_cpu": torch.from_numpy(step.query_start_loc),
                "num_actual_tokens": step.rows,
                "max_query_len": step.max_query_len,
                "slot_mapping": metadata.slot_mapping[: step.rows],
                "positions": None,
                "_token_to_req_indices_cache": None,
            }
        return replace(metadata, **changes)

    def _prompts(
        self,
        drops: Sequence[RequestDrop | None],
        step: StepGeometry,
        scheduled: NDArray[np.int32],
        computed: NDArray[np.int32],
    ) -> PrunedPrompts | None:
        """The prompts that come in this step and are ranked or cut here; None where there are none."""
        if computed.all():
            return None
        protected = np.zeros(int(scheduled.sum()), dtype=bool)
        facts: list[tuple[int, int, int]] = []
        settled: list[tuple[int, int]] = []
        known: list[tuple[int, int, Tensor]] = []
        firsts = np.cumsum(scheduled) - scheduled
        for drop, begun, first, start in zip(
            drops, computed.tolist(), firsts.tolist(), step.starts.tolist(), strict=True
        ):
            if drop is None or begun:
                continue
            if drop.kept is not None:
                rows_then, start_then = drop.kept
                known.append((start, drop.reaching, rows_then - start_then))
                continue
            protected[first : first + drop.tokens] = drop.protected
            if drop.rated:
                facts.append((start, drop.reaching, drop.tokens - drop.dropped))
            elif drop.dropped > drop.lost:
                settled.append((start, drop.reaching))
        if not (facts or settled or known):
            return None
        buckets = []
        if facts:
            for padded, members in make_buckets(*np.array(facts, dtype=np.int64).T):
                start, length, kept = self._to_device(members)
                buckets.append(Bucket(padded, start, length, kept))
        return PrunedPrompts(
            step.reaching,
            step.rows,
            self._to_device(protected),
            tuple(buckets),
            tuple(known),
            tuple(settled),
        )

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _copy(self, buffer: Tensor, array: NDArray[Any]) -> None:
        buffer[: len(array)].copy_(self._to_device(array), non_blocking=True)
