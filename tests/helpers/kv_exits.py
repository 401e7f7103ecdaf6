# SPDX-License-Identifier: Apache-2.0
"""What may happen to requests on which a gate decides: blocks return, and decisions arrive late."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tests.helpers.kv_engine import Engine
from tests.helpers.kv_events import leftovers
from tests.reference import Request

#: Fills the cache before requests come: no key or value is this.
UNTOUCHED = 77.0


def exits(engine: Engine, requests: Sequence[Request]) -> dict[str, Any]:
    """Requests on which the gate decides, one at a time: their blocks, and the pool, at every turn.

    `turns` holds, after each time blocks were given out or came back, the blocks by group and the pool's
    free ones; `written` how many values of the returned blocks the step had written to.
    """
    engine.llm.reset_prefix_cache()
    specs = [g.kv_cache_spec for g in engine.scheduler.kv_cache_config.kv_cache_groups]
    before, found = engine.pool.get_num_free_blocks(), []
    schedule = engine.scheduler.schedule
    for number, request in enumerate(requests):
        name = f"exit-{number}"
        turns: list[tuple[str, list[list[int]], int]] = []

        def look(what: str, name: str = name, turns: Any = turns) -> None:
            held = [i for i in engine.scheduler.requests if i.startswith(f"{name}-")]
            managers = engine.scheduler.kv_cache_manager.coordinator.single_type_managers
            ids = [[b.block_id for b in m.req_to_blocks.get(held[0], ())] for m in managers] if held else []
            turns.append((what, ids, engine.pool.get_num_free_blocks()))

        def spied(*args: Any, look: Any = look, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            look("scheduled")
            return output

        for cache in engine.runner.kv_caches:
            cache.fill_(UNTOUCHED)
        engine.scheduler.schedule = spied
        engine.add(request, name)
        written = None
        for _ in engine.steps():
            look("stepped")
            lost = {i for ids in turns[0][1] for i in ids} - {i for ids in turns[-1][1] for i in ids}
            if written is None and lost and turns[-1][1]:
                written = sum(touched(cache, sorted(lost), engine) for cache in engine.runner.kv_caches)
        engine.scheduler.schedule = schedule
        counts = [(what, [len(ids) for ids in held], free) for what, held, free in turns]
        found.append({"turns": counts, "written": written, "request": request})
    return {
        "cases": found,
        "bands": [s.band for s in specs],
        "block_size": specs[0].block_size,
        "free": before,
    }


def touched(cache: torch.Tensor, blocks: list[int], engine: Engine) -> int:
    """Values of some blocks that are not as they were filled."""
    count = engine.scheduler.kv_cache_config.num_blocks
    (dim,) = (d for d, size in enumerate(cache.shape) if size == count)
    return int((cache.index_select(dim, torch.tensor(blocks, device=cache.device)) != UNTOUCHED).sum())


def reset_while_deciding(engine: Engine, requests: Sequence[Request], first: int) -> dict[str, Any]:
    """The prefix cache is reset under a crowd whenever a gate's decision is in flight.

    Each request is so preempted before the scheduler hears what was decided on it. One is asked again alone,
    with a second reset once the decision has arrived: before the worker hears what that made of its blocks.
    Then it is aborted behind the first reset. Without asynchronous scheduling no decision is ever in flight,
    and the crowd's resets come after some of the first steps.

    Args:
        engine: a step of it takes one prompt.
        requests: the crowd.
        first: which of them begins, and is asked again. It alone resumes in the step after a reset, which is
            scheduled before the decision arrives.

    Returns:
        `late`: by request whose decision was in flight at a reset, what the worker had decided by then, and
        after the next step whether it had resumed and the scheduler had heard. `beyond`: by how many blocks
        any request was off its plan after any step. `aborted`: decisions in flight at the abort.
    """
    steps = () if engine.core.batch_queue is not None else (1, 2, 3, 8)
    late: dict[str, dict[str, Any]] = {}
    beyond: set[int] = set()

    def look() -> tuple[bool, bool]:
        """Whether decisions are in flight, and whether some have arrived that were at the last look."""
        plans, running = engine.scheduler.prompt_plans, [r.request_id for r in engine.scheduler.running]
        beyond.update(blocks_beyond_plan(engine))
        arrived = [name for name in late if "heard" not in late[name]]
        for name in arrived:
            late[name] |= {"resumed": name in running, "heard": plans[name].gate is None}
        # each once, or one whose decision got lost would be preempted for ever
        deciding = [name for name in in_flight(engine) if name not in late]
        late.update({name: {"leaves": decided_by_worker(engine, name)} for name in deciding})
        return bool(deciding), bool(arrived)

    def reset(wanted: bool = True) -> None:
        if wanted:
            engine.llm.reset_prefix_cache(reset_running_requests=True)

    before = engine.metric("vllm:num_preemptions")
    order = [first, *(i for i in range(len(requests)) if i != first)]
    answers = engine.drive(
        {f"late-{i}": requests[i] for i in order}, lambda step: reset(look()[0] or step in steps)
    )
    preemptions = engine.metric("vllm:num_preemptions") - before
    again = engine.drive({"again": requests[first]}, lambda step: reset(any(look())))["again"]
    engine.add(requests[first], "gone")
    engine.llm.llm_engine.step()
    aborted = len(in_flight(engine))
    reset()
    engine.llm.llm_engine.abort_request(["gone"])
    return {
        "answers": [answers[f"late-{i}"] for i in range(len(requests))],
        "again": again,
        "late": {name.rpartition("-")[0]: told for name, told in late.items()},
        "beyond": beyond,
        "aborted": aborted,
        "preemptions": preemptions,
        **leftovers(engine),
        "unheard": len(engine.core.batch_queue or ()),
    }


def in_flight(engine: Engine) -> list[str]:
    """Requests whose prompt's step the worker has done and the scheduler has not yet heard of.

    `EngineCore.step_with_batch_queue` leaves the last step's output queued where it may schedule ahead.
    """
    plans = engine.scheduler.prompt_plans
    names = [name for _, step, _ in engine.core.batch_queue or () for name in step.num_scheduled_tokens]
    return [name for name in names if name in plans and plans[name].gate is not None]


def decided_by_worker(engine: Engine, request_id: str) -> bool | None:
    """What the gate decided on a request, as the worker has it."""
    question = engine.drops[request_id][engine.scheduler.prompt_plans[request_id].gate].gate
    decision: bool | None = question.leaves
    return decision


def blocks_beyond_plan(engine: Engine) -> Iterator[int]:
    """For each running request and KV-cache group, the blocks held beyond those that its plan needs."""
    for request in engine.scheduler.running:
        for manager in engine.scheduler.kv_cache_manager.coordinator.single_type_managers:
            slots = request.num_computed_tokens - manager.dropped(request.request_id)
            yield len(manager.req_to_blocks[request.request_id]) - -(-slots // manager.block_size)
