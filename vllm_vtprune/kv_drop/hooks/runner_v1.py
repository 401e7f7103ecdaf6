# SPDX-License-Identifier: Apache-2.0
"""The seam in Model Runner V1: tells each step's plan to the layers above the prune layer.

Hooks, all of `vllm.v1.worker.gpu_model_runner.GPUModelRunner` in vLLM 0.32, by subclassing: `_update_states`
(appends the step's blocks to those that requests hold), `_prepare_inputs` (the step's batch is settled),
`_get_slot_mappings` (which slots the step writes), `_dummy_run` and `_on_request_state_removed`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vllm_vtprune.kv_drop.bands import KVDropBands
from vllm_vtprune.kv_drop.geometry import RequestDrop
from vllm_vtprune.kv_drop.hooks.cache import groups_above
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config
from vllm_vtprune.kv_drop.hooks.exits import told_held
from vllm_vtprune.kv_drop.hooks.requests import request_drop

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


@cache
def dropping_runner(base: type[GPUModelRunner]) -> type[GPUModelRunner]:
    """A subclass of a V1 model runner with the seam. One class per base."""

    class KVDropModelRunner(base):  # type: ignore[misc, valid-type]
        """The platform's model runner; what it adds is in five overrides."""

        _drops: dict[str, tuple[RequestDrop, ...] | None]

        @property
        def _kv_drop(self) -> KVDropBands:
            state: KVDropBands = self.get_model().kv_drop
            return state

        def _update_states(self, scheduler_output: Any) -> Any:
            for request_id, held in told_held(scheduler_output).items():
                self._hold_fewer(request_id, held)
            return super()._update_states(scheduler_output)

        def _hold_fewer(self, request_id: str, held: list[int]) -> None:
            """Forget the blocks that a request returned, in its state and in its row of the batch."""
            request = self.requests.get(request_id)
            if request is None:
                return
            row = self.input_batch.req_id_to_index.get(request_id)
            for group, (block_ids, count) in enumerate(zip(request.block_ids, held, strict=True)):
                del block_ids[count:]
                if row is not None:
                    table = self.input_batch.block_table[group]
                    table.block_table.np[row, count : table.num_blocks_per_row[row]] = 0
                    table.num_blocks_per_row[row] = count

        def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: NDArray[np.int32]) -> Any:
            prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
            batch = self.input_batch
            drops = [self._drop(request_id) for request_id in batch.req_ids]
            self._kv_drop.begin(drops, num_scheduled_tokens, batch.num_computed_tokens_cpu[: len(drops)])
            return prepared

        def _drop(self, request_id: str) -> tuple[RequestDrop, ...] | None:
            if request_id not in self._drops:
                request = self.requests[request_id]
                self._drops[request_id] = request_drop(
                    request.prompt_token_ids,
                    request.mm_features,
                    request.sampling_params,
                    kv_drop_config(self.vllm_config),
                )
            return self._drops[request_id]

        def _get_slot_mappings(
            self, *args: Any, **kwargs: Any
        ) -> tuple[dict[int, Tensor] | None, dict[str, Tensor] | list[dict[str, Tensor]] | None]:
            by_group, by_layer = super()._get_slot_mappings(*args, **kwargs)
            if by_group is not None:
                specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
                for group_id, border in groups_above(specs):
                    table = self.input_batch.block_table[group_id]
                    rows = table.get_device_tensor(self.input_batch.num_reqs)
                    held = table.num_blocks_per_row[: len(rows)]
                    # the tensors by layer are the same
                    self._kv_drop.bands[border].write_slots(rows, table.block_size, by_group[group_id], held)
            return by_group, by_layer

        def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
            self._kv_drop.clear()
            return super()._dummy_run(*args, **kwargs)

        def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
            super()._on_request_state_removed(req_id, req_state)
            self._drops.pop(req_id, None)

    return KVDropModelRunner


def install(runner: GPUModelRunner) -> None:
    """Turn a model runner into its subclass with the seam.

    The worker's `init_device` names vLLM's class outright, so the instance changes its class once it is
    built. Idempotent.
    """
    if not hasattr(runner, "_drops"):
        runner.__class__ = dropping_runner(type(runner))  # type: ignore[arg-type]
        runner._drops = {}  # type: ignore[attr-defined]
