# SPDX-License-Identifier: Apache-2.0
"""vLLM's worker with stage 2: KV-cache specs split at the prune layer, and the model runner's seam installed.

`ParallelConfig.worker_cls` names `KVDropWorker`. Hooks of `vllm.v1.worker.gpu_worker.Worker` in vLLM 0.32:
`init_device`, which builds the model runner, `determine_available_memory`, `get_kv_cache_spec`,
`execute_model` and `sample_tokens`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform

from vllm_vtprune.kv_drop.hooks.cache import split_specs
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config
from vllm_vtprune.kv_drop.hooks.exits import report_decisions, told_held
from vllm_vtprune.kv_drop.hooks.failures import report_failures
from vllm_vtprune.kv_drop.hooks.runner_v1 import install

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.worker.gpu_worker import Worker as _Worker
elif current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class KVDropWorker(_Worker):
    """The platform's worker. Model Runner V2 takes the rest from the model class (`runner_v2`)."""

    def init_device(self) -> None:
        """Build the model runner, then give it the seam."""
        super().init_device()
        if not self.use_v2_model_runner:
            install(self.model_runner)

    def determine_available_memory(self) -> int:
        """Let vLLM measure its memory, the ratings of the prune layers included."""
        runner: Any = self.model_runner
        drop = runner.get_model().kv_drop
        drop.profiling = True
        try:
            return super().determine_available_memory()
        finally:
            drop.profiling = False

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Tell Model Runner V2 which requests leave for good, and which hold fewer blocks; run the step."""
        if self.use_v2_model_runner:
            runner: Any = self.model_runner
            blocks = runner.block_tables.num_blocks.np
            runner.model_state.expect(
                scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids or (), blocks
            )
            for request_id, held in told_held(scheduler_output).items():
                row = runner.req_states.req_id_to_index.get(request_id)
                if row is not None:
                    blocks[:, row] = held
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Let vLLM finish the step; report whom it could not serve, and what the gate decided."""
        output = super().sample_tokens(grammar_output)
        model: Any = self.model_runner.get_model()
        report_failures(output, model.kv_drop)
        report_decisions(output, model.kv_drop)
        return output

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """The layers' specs, those of each band apart."""
        return split_specs(super().get_kv_cache_spec(), *kv_drop_config(self.vllm_config).prune_layers)
