# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with one more rule: a prompt that will be pruned is taken whole, or not yet.

Hooks, all of `vllm.v1.core.sched.scheduler.Scheduler` in vLLM 0.32: `add_request`, `_free_request`,
`_get_local_prefix_cache_hit`, where a prompt whose later turns go on from it is looked up,
`_reserve_prefill_lookahead`, the last word on how many tokens of a request a step takes, where 0 means "not
yet", and `update_from_output`, which fails the requests of `encoder_cache_mismatch_reqs` and goes on. What
`_free_request` returns is told with a request's last output (`RequestOutput.kv_transfer_params`).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_vtprune.contract import KWARG
from vllm_vtprune.kv_drop.hooks.cache import PlannedBlocksManager
from vllm_vtprune.kv_drop.hooks.config import kv_drop_config
from vllm_vtprune.kv_drop.hooks.exits import decisions, tell_held
from vllm_vtprune.kv_drop.hooks.failures import failed_requests
from vllm_vtprune.kv_drop.hooks.requests import first_turn, plan_request
from vllm_vtprune.kv_drop.hooks.reuse import Passages
from vllm_vtprune.kv_drop.plan import PromptPlan, gate_report
from vllm_vtprune.settings import KVSettings

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_WHY = {
    "too_long": "a prompt longer than one step can take (raise --max-num-batched-tokens)",
    "prompt_logprobs": "log-probabilities of the prompt together with kv_keep below 1",
    "prompt_embeds": "a prompt given as embeddings",
    "streaming_input": "a prompt that may still grow",
    "bad_settings": "an entry in extra_args that is no KV setting (build it with request_kwargs)",
}


class _KVDropMixin(Scheduler):
    """What both of vLLM's schedulers gain.

    Attributes:
        prompt_plans: pruned requests by id, from arrival until they are freed.
        unpruned: how many requests were served whole although they asked for less, by reason.
        gate_reports: by request that the gate decided on, what its answer tells (`gate_report`).
        passages: what later turns go on from; None where none do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kv_drop_config = kv_drop_config(self.vllm_config)
        self.prompt_plans: dict[str, PromptPlan] = {}
        self.unpruned: dict[str, int] = {}
        self.gate_reports: dict[str, dict[str, Any]] = {}
        # blocks that requests still hold which returned some since the last step
        self._held: dict[str, list[int]] = {}
        self.passages: Passages | None = None
        if self.kv_drop_config.reuse_block:
            self.passages = Passages(self.kv_drop_config.reuse_block, self.kv_cache_config.num_blocks)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if not isinstance(manager, PlannedBlocksManager):
                raise RuntimeError(
                    "vtprune: the worker did not split the KV-cache groups at the prune layer."
                )
            if self.passages is not None and manager.block_size != self.kv_drop_config.reuse_block:
                raise RuntimeError("vtprune: KV-cache groups have blocks of several sizes.")
            manager.plans, manager.passages = self.prompt_plans, self.passages

    def add_request(self, request: Request) -> None:
        """Plan the request's prompt before it is queued."""
        if request.request_id not in self.requests:
            self._plan(request)
        else:
            # the next chunk of a streaming-input session, whose settings replace those of the last one
            _keep_whole(request)
        super().add_request(request)

    def _plan(self, request: Request) -> None:
        plan = plan_request(
            request.prompt_token_ids,
            request.mm_features,
            request.sampling_params,
            self.kv_drop_config,
            num_tokens=request.num_prompt_tokens,
            streaming_input=request.resumable,
        )
        if not plan.whole:
            self.prompt_plans[request.request_id] = plan
            turn = None if self.passages is None else first_turn(request, self.kv_drop_config)
            if self.passages is not None and turn is not None:
                self.passages.add(request, plan, *turn)
            else:
                # what lies in the cache was computed for whole prompts
                request.skip_reading_prefix_cache = True
        if plan.unpruned is not None:
            first = plan.unpruned not in self.unpruned
            self.unpruned[plan.unpruned] = self.unpruned.get(plan.unpruned, 0) + 1
            if first:
                logger.warning("vtprune: served unpruned: %s. Not logged again.", _WHY[plan.unpruned])
            if plan.unpruned == "streaming_input":
                _keep_whole(request)

    def _get_local_prefix_cache_hit(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self.passages is None or request.request_id not in self.passages:
            return super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        managers: Any = self.kv_cache_manager.coordinator.single_type_managers
        dropped = [manager.dropped(request.request_id) for manager in managers]
        may_read = self.kv_cache_manager.prefix_cache_lookup_enabled(request)
        found, tokens = self.passages.find(request, managers, dropped, may_read=may_read)
        if not tokens:
            return self.kv_cache_manager.empty_kv_cache_blocks, 0, 0, False
        return self.kv_cache_manager.create_kv_cache_blocks(tuple(found)), tokens, 0, False

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        tokens: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        plan = self.prompt_plans.get(request.request_id)
        if plan is not None and num_computed_tokens + tokens < plan.tokens:
            # 0.32 ends the step's admissions here; 0.33 goes on to the next in the queue, which could
            # overtake this prompt without end. No more than none may be running, so they end in both.
            self.max_num_active_reqs = 0
            return 0
        return tokens

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """The next step; a bound that a waiting prompt set in it is lifted afterwards."""
        most = self.max_num_active_reqs
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_active_reqs = most
        passages = self.passages or ()
        for new in output.scheduled_new_reqs:
            if new.req_id in passages:
                # vLLM strips the pictures that a hit covers; V1 keeps what it is told first, and a preempted
                # request may have to begin at its first token
                new.mm_features = self.requests[new.req_id].mm_features
        tell_held(output, self._held)
        self._held = {}
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """Fail the requests on whose prompts worker and scheduler disagree; their results are dropped."""
        for request_id in failed_requests(model_runner_output):
            logger.error(
                "vtprune: request %s failed: the worker has more tokens for it above the prune layer than "
                "the scheduler gave blocks for. Please report this.",
                request_id,
            )
            for name in self._fail(request_id):
                _withhold(model_runner_output, name)
                self.encoder_cache_mismatch_reqs.add(name)
        for request_id, leaves in decisions(model_runner_output).items():
            self._decide(request_id, leaves)
        return super().update_from_output(scheduler_output, model_runner_output)

    def _fail(self, request_id: str) -> list[str]:
        """The requests that fail with one: those too that may have read what it published and never wrote."""
        if self.passages is None:
            return [request_id]
        names = self.passages.close(request_id)
        for name in names:
            self.kv_cache_manager.evict_blocks(
                {i for ids in self.kv_cache_manager.get_block_ids(name) for i in ids}
            )
        return names

    def _decide(self, request_id: str, leaves: bool) -> None:
        """Plan anew a prompt that the gate decided on; what it then holds in surplus returns to the pool.

        With asynchronous scheduling the request may be a step further, and its blocks are counted with that.
        It may also have been preempted since: then it holds none and comes back by the new plan, or has
        resumed by the old one and returns what it got for that.
        """
        plan = self.prompt_plans.get(request_id)
        if plan is None or plan.gate is None:
            return
        self.prompt_plans[request_id] = plan.decided(leaves)
        self.gate_reports[request_id] = gate_report(plan, leaves)
        if not leaves:
            return
        tokens = self.requests[request_id].num_computed_tokens
        managers: Any = self.kv_cache_manager.coordinator.single_type_managers
        held = [manager.return_surplus(request_id, tokens) for manager in managers]
        if any(held):
            self._held[request_id] = held

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        kv_transfer_params, *others = super()._free_request(request, *args, **kwargs)
        self.prompt_plans.pop(request.request_id, None)
        if self.passages is not None:
            self.passages.remove(request.request_id)
        report = self.gate_reports.pop(request.request_id, None)
        if report is not None:
            # the one part of an answer that a scheduler may fill without a connector of vLLM's
            kv_transfer_params = {**(kv_transfer_params or {}), KWARG: report}
        return kv_transfer_params, *others


def _keep_whole(request: Request) -> None:
    """Have the worker serve a prompt that may grow whole: it cannot see that, so its settings say so."""
    if request.sampling_params is not None:
        request.sampling_params = request.sampling_params.clone()
        request.sampling_params.extra_args = {
            **(request.sampling_params.extra_args or {}),
            **KVSettings().extra_args(),
        }


def _withhold(output: ModelRunnerOutput, request_id: str) -> None:
    """Take a request's results out of a step's output."""
    if output.sampled_token_ids and request_id in output.req_id_to_index:
        output.sampled_token_ids[output.req_id_to_index[request_id]] = []
    output.prompt_logprobs_dict.pop(request_id, None)
    output.prompt_token_id_logprobs_dict.pop(request_id, None)


class KVDropScheduler(_KVDropMixin, Scheduler):
    """`vllm.v1.core.sched.scheduler.Scheduler` with pruned prompts."""


class AsyncKVDropScheduler(_KVDropMixin, AsyncScheduler):
    """`vllm.v1.core.sched.async_scheduler.AsyncScheduler` with pruned prompts."""


def build_scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler vLLM would pick, with pruned prompts.

    `SchedulerConfig.scheduler_cls` names this function. vLLM decides between the two only after the
    configuration hook ran, so the choice is made when it builds one.
    """
    vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    scheduler = AsyncKVDropScheduler if vllm_config.scheduler_config.async_scheduling else KVDropScheduler
    return scheduler(*args, **kwargs)
