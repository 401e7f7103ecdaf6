# SPDX-License-Identifier: Apache-2.0
"""The seam in Model Runner V2, vLLM's default on CUDA: a model state that plans each step.

The model class names it through `get_model_state_cls`. Hooks, all of
`vllm.v1.worker.gpu.model_states.default.DefaultModelState` in vLLM 0.32: `add_request`, `remove_request` and
`prepare_attn`, which every real and dummy step with attention passes through. All else is shared with V1.
V2 removes a preempted request like a finished one and adds it anew when it resumes, so `KVDropWorker` says
beforehand which is which: what was kept of a preempted prompt must be kept again. It also brings the block
counts (`vllm.v1.worker.gpu.block_table.BlockTables.num_blocks`), which no argument of these methods carries.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_vtprune.kv_drop.geometry import RequestDrop
from vllm_vtprune.kv_drop.hooks.cache import groups_above
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config
from vllm_vtprune.kv_drop.hooks.requests import request_drop

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import CUDAGraphMode
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_vtprune.kv_drop.bands import KVDropBands


class KVDropModelState(DefaultModelState):
    """The default model state; knows what each request loses and tells the layers above the prune layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drops: dict[str, tuple[RequestDrop, ...] | None] = {}
        self._preempted: dict[str, tuple[RequestDrop, ...] | None] = {}
        self._leaving: frozenset[str] = frozenset()
        self._blocks: NDArray[np.int32] | None = None

    def expect(
        self, finished: Collection[str], preempted: Collection[str], blocks: NDArray[np.int32]
    ) -> None:
        """Say which of the requests that a step is about to remove will come back.

        Args:
            finished: ids that will not, those that were aborted while they waited to resume among them.
            preempted: ids that will.
            blocks: how many blocks each request holds, [groups, requests of the runner]; read once the step's
                own are in it.
        """
        # a reset of the prefix cache preempts, and an abort before the next step finishes what it preempted
        self._leaving = frozenset(preempted).difference(finished)
        self._blocks = blocks
        for request_id in finished:
            self._preempted.pop(request_id, None)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Plan the request as the scheduler did, or go on with what a preempted one lost."""
        super().add_request(req_index, new_req_data)
        if new_req_data.req_id in self._preempted:
            self._drops[new_req_data.req_id] = self._preempted.pop(new_req_data.req_id)
            return
        # read here, since vLLM fits the block size to the attention backend after the model is loaded
        config = kv_drop_config(self.vllm_config)
        if new_req_data.num_computed_tokens > 0 and not config.reuse_block:
            # a pruned prompt starts at its first token: this one read the prefix cache, or it is a
            # streaming-input session's that grew
            self._drops[new_req_data.req_id] = None
            return
        self._drops[new_req_data.req_id] = request_drop(
            new_req_data.prompt_token_ids,
            new_req_data.mm_features,
            new_req_data.sampling_params,
            config,
        )

    def remove_request(self, req_id: str) -> None:
        """Forget a request that finished; put one that was preempted aside.

        `GPUModelRunner.add_requests` also calls this for each request that it is about to add. One that was
        preempted may resume in that very step (`Scheduler.reset_prefix_cache`): by then it was put aside.
        """
        super().remove_request(req_id)
        if req_id not in self._drops:
            return
        drop = self._drops.pop(req_id)
        if req_id in self._leaving:
            self._preempted[req_id] = drop

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Any,
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Start the step, then let vLLM build the metadata of every group.

        Dummy requests are not known and lose nothing.
        """
        state = cast("KVDropBands", self.model.kv_drop)
        drops = [self._drops.get(request_id) for request_id in input_batch.req_ids]
        state.begin(drops, input_batch.num_scheduled_tokens, input_batch.num_computed_tokens_np)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        for group_id, border in groups_above(specs):
            state.bands[border].write_slots(
                block_tables[group_id],
                specs[group_id].block_size,
                slot_mappings[group_id],
                self._blocks_held(group_id, input_batch),
            )
        return super().prepare_attn(
            input_batch,
            cudagraph_mode,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            *args,
            **kwargs,
        )

    def _blocks_held(self, group_id: int, input_batch: InputBatch) -> NDArray[np.int32] | None:
        """Blocks of the group that each request of the batch holds, [R]; None for a dummy batch."""
        if self._blocks is None or input_batch.req_ids[0] not in self._drops:
            return None
        held: NDArray[np.int32] = self._blocks[group_id, input_batch.idx_mapping_np]
        return held
