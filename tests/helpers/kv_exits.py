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


class LateDecisions:
    """Sees decisions of a gate that are in flight while the engine is driven.

    Attributes:
        late: by request whose decision was in flight, what the worker had decided by then, and after the next
            step whether the request was running and the scheduler had heard.
        beyond: by how many blocks any running request was off its plan after any step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.late: dict[str, dict[str, bool | None]] = {}
        self.beyond: set[int] = set()

    def look(self) -> tuple[bool, bool]:
        """Whether decisions are in flight, each told once, and whether some of the last look have arrived."""
        scheduler = self._engine.scheduler
        self.beyond.update(blocks_beyond_plan(self._engine))
        running = [request.request_id.rpartition("-")[0] for request in scheduler.running]
        plans = {name.rpartition("-")[0]: plan for name, plan in scheduler.prompt_plans.items()}
        arrived = [name for name, told in self.late.items() if "heard" not in told]
        for name in arrived:
            self.late[name] |= {"running": name in running, "heard": plans[name].gate is None}
        deciding = {name.rpartition("-")[0]: name for name in in_flight(self._engine)}
        new = [name for name in deciding if name not in self.late]
        self.late.update({name: {"leaves": decided_by_worker(self._engine, deciding[name])} for name in new})
        return bool(new), bool(arrived)


def reset_while_deciding(
    engine: Engine, requests: Sequence[Request], steps: Sequence[int] = (1, 2, 3, 8)
) -> dict[str, Any]:
    """The prefix cache is reset under a crowd whenever a gate's decision is in flight.

    Each request is so preempted before the scheduler hears what was decided on it. All but the first then
    wait until it has heard, since the next step has room for one prompt. One whose tokens leave is asked
    again alone, with a second reset once its decision has arrived: before the worker hears what that made of
    its blocks. Then it is aborted behind the first reset.

    Args:
        engine: a step of it takes one prompt.
        requests: the crowd.
        steps: those after which the cache is reset where no decision is ever in flight.
    """
    seen = LateDecisions(engine)

    def reset(wanted: bool = True) -> None:
        if wanted:
            engine.llm.reset_prefix_cache(reset_running_requests=True)

    if engine.core.batch_queue is not None:
        steps = ()
    before = engine.metric("vllm:num_preemptions")
    asked = {f"late-{i}": r for i, r in enumerate(requests)}
    answers = engine.drive(asked, lambda step: reset(seen.look()[0] or step in steps))
    preemptions = engine.metric("vllm:num_preemptions") - before
    one = next((name for name in asked if answers[name]["gate"]), "late-0")
    again = engine.drive({"again": asked[one]}, lambda step: reset(any(seen.look())))["again"]
    engine.add(asked[one], "gone")
    engine.llm.llm_engine.step()
    aborted = len(in_flight(engine))
    reset()
    engine.llm.llm_engine.abort_request(["gone"])
    return {
        "answers": [answers[name] for name in asked],
        "again": (again["tokens"] == answers[one]["tokens"], again["gate"]),
        "late": seen.late,
        "beyond": seen.beyond,
        "aborted": aborted,
        "preemptions": preemptions,
        **leftovers(engine),
        "unheard": sum(step.total_num_scheduled_tokens for _, step, _ in engine.core.batch_queue or ()),
    }


def reset_then_crowded(engine: Engine, requests: Sequence[Request], first: int) -> dict[str, Any]:
    """A crowd outgrows the cache, which was reset once, when the decision on its first request was in flight.

    That request resumes in the next step, which is scheduled before the decision arrives: with blocks for
    tokens that have left. The others take what it returns, while it takes more.

    Args:
        engine: its cache is too small for the crowd.
        requests: the crowd.
        first: which of them begins.
    """
    seen = LateDecisions(engine)

    def reset(step: int) -> None:
        if seen.look()[0] and step == 0:
            engine.llm.reset_prefix_cache(reset_running_requests=True)

    before = engine.metric("vllm:num_preemptions")
    order = [first, *(i for i in range(len(requests)) if i != first)]
    answers = engine.drive({f"first-{i}": requests[i] for i in order}, reset)
    return {
        "answers": [answers[f"first-{i}"] for i in range(len(requests))],
        "late": seen.late.get(f"first-{first}"),
        "beyond": seen.beyond,
        "preemptions": engine.metric("vllm:num_preemptions") - before,
        **leftovers(engine),
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
