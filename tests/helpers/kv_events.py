# SPDX-License-Identifier: Apache-2.0
"""What may happen to requests while they are served, on an engine with K = 2 and a small cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from tests.helpers.kv_cases import (
    QUESTION,
    TEXT,
    band_cases,
    brief_crowd,
    grid,
    replayed,
    resettable,
    ungated,
    unpruned,
)
from tests.helpers.kv_engine import Engine, refusal
from tests.helpers.pictures import noise
from tests.reference import Request
from vllm_vtprune.models import decoder


def events(engine: Engine) -> dict[str, Any]:
    """All of them; those of Model Runner V2 alone where it runs."""
    found: dict[str, Any] = {
        "running": capacity(engine),
        "crowd": preempted_and_aborted(engine),
        "reset": reset_while_running(engine),
        "reset_abort": reset_then_abort(engine),
        "dummy_runs": dummy_runs_between(engine),
        "asleep": sleep_and_wake(engine),
        "session": session(engine),
        "overrun": overrun(engine),
    }
    if engine.is_v2:
        found["token_ids"] = token_ids(engine)
    return found


def capacity(engine: Engine) -> dict[float, int]:
    """How many requests run at once in the cache, by kv_keep. Each its own picture, so none shares blocks."""
    running = {}
    for number, keep in enumerate((1.0, 0.5, 0.25)):
        for i in range(18):
            # 165 tokens: eight more need no other block, and six prompts are a step
            image = noise(100 + 18 * number + i)
            engine.add(
                Request(QUESTION, (image,), keep_ratio=0.83, kv_keep=keep, max_tokens=8), f"{keep}-{i}"
            )
        running[keep] = max(len(engine.scheduler.running) for _ in engine.steps())
    return running


def preempted_and_aborted(engine: Engine) -> dict[str, Any]:
    """A crowd that outgrows the cache; the first of them to be preempted is aborted while it waits."""
    asked = {f"crowd-{i}": r for i, r in enumerate(brief_crowd())}
    gone: set[str] = set()

    def abort(step: int) -> None:
        for request in list(engine.scheduler.waiting):
            name = request.request_id.rpartition("-")[0]
            if request.status.name == "PREEMPTED" and not gone:
                engine.llm.llm_engine.abort_request([name])
                gone.add(name)

    before = engine.metric("vllm:num_preemptions")
    answers = engine.drive(asked, abort)
    return {
        "answers": [None if name in gone else answers[name] for name in asked],
        "aborted": len(gone),
        "preemptions": engine.metric("vllm:num_preemptions") - before,
        **leftovers(engine),
    }


def reset_while_running(
    engine: Engine, requests: Sequence[Request] | None = None, steps: Sequence[int] = (6, 15)
) -> dict[str, Any]:
    """The prefix cache is reset under running requests: each is preempted and resumes in the same step."""

    def reset(step: int) -> None:
        if step in steps:
            engine.llm.reset_prefix_cache(reset_running_requests=True)

    before = engine.metric("vllm:num_preemptions")
    answers = engine.drive({f"reset-{i}": r for i, r in enumerate(requests or resettable())}, reset)
    return {
        "answers": list(answers[f"reset-{i}"] for i in range(len(answers))),
        "preemptions": engine.metric("vllm:num_preemptions") - before,
        **leftovers(engine),
    }


def reset_then_abort(engine: Engine) -> dict[str, Any]:
    """One of the requests that a reset preempted is aborted before the next step."""

    def reset(step: int) -> None:
        if step == 6:
            engine.llm.reset_prefix_cache(reset_running_requests=True)
            engine.llm.llm_engine.abort_request(["gone-2"])

    answers = engine.drive({f"gone-{i}": r for i, r in enumerate(resettable())}, reset)
    kept = [None if i == 2 else answers[f"gone-{i}"] for i in range(len(resettable()))]
    return {"answers": kept, **leftovers(engine)}


def dummy_runs_between(engine: Engine) -> dict[str, Any]:
    """What vLLM runs without a request: its kernels' warm-up, and dummy batches between steps."""
    worker = engine.core.model_executor.driver_worker.worker
    tell_who_finished(engine)
    if engine.is_v2:
        from vllm.v1.worker.gpu.warmup import warmup_kernels

        warmup_kernels(engine.runner, worker.execute_model, worker.sample_tokens)
        # at an engine's start no block holds anything yet
        engine.llm.reset_prefix_cache()

    # as at an engine's start, where vLLM measures memory
    drop = engine.runner.get_model().kv_drop
    drop.profiling = True
    with mock.patch.object(decoder, "costliest", wraps=decoder.costliest) as rated:
        engine.runner.profile_run()
    assert not drop.profiling
    # the runner has cleared its cache of embeddings, and the scheduler must not count on them
    engine.core.reset_encoder_cache()

    def dummy_run(step: int) -> None:
        if step in (2, 5, 9):
            worker.execute_dummy_batch()
            engine.runner._dummy_run(100)

    answers = engine.drive({f"dummy-{i}": r for i, r in enumerate(resettable())}, dummy_run)
    return {
        "answers": [answers[f"dummy-{i}"] for i in range(len(answers))],
        "rated": [call.kwargs["rows"] for call in rated.call_args_list],
        "reload": refused_reload(engine),
    }


def refused_reload(engine: Engine) -> str:
    """What `reload_weights` is told; the engine goes on with the weights it has."""
    try:
        engine.llm.collective_rpc("reload_weights")
    except Exception as error:
        return str(error)
    return ""


def sleep_and_wake(engine: Engine) -> list[dict[str, Any]]:
    """Unpruned requests before and after a sleep of level 2, after which memory holds anything.

    `vllm.v1.worker.gpu_worker.Worker` saves and restores; the CPU's worker has no device memory to give back.
    """
    from vllm.v1.worker.gpu_worker import Worker

    class Forgetful:
        def suspend(self, level: int) -> None:
            for tensor in tensors_of(engine.runner.get_model().kv_drop):
                tensor.fill_(99)

        def resume(self, tags: list[str] | None) -> None:
            pass

    worker = engine.core.model_executor.driver_worker.worker
    before = engine.run(unpruned()[:2])
    with (
        mock.patch.object(type(worker), "sleep_mode_backend", Forgetful()),
        mock.patch("torch.accelerator.synchronize"),
        mock.patch("torch.accelerator.get_memory_info", return_value=(1, 2)),
    ):
        Worker.sleep(worker, 2)
        Worker.wake_up(worker)
    return [*before, *engine.run(unpruned()[:2])]


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor of the plugin's own that an object holds, whatever it is registered as."""
    registered = [*getattr(state, "_buffers", {}).values(), *getattr(state, "_modules", {}).values()]
    for value in [*vars(state).values(), *registered]:
        for one in value if isinstance(value, list | tuple | torch.nn.ModuleList) else (value,):
            if isinstance(one, torch.Tensor):
                yield one
            elif type(one).__module__.startswith("vllm_vtprune."):
                yield from tensors_of(one)


def leftovers(engine: Engine) -> dict[str, int]:
    """Requests that worker and scheduler still know of once all are answered."""
    tell_who_finished(engine)
    known = len(engine.drops)
    if engine.is_v2:
        known += len(engine.runner.model_state._preempted)
    return {"plans_left": len(engine.scheduler.prompt_plans) + known}


def tell_who_finished(engine: Engine) -> None:
    """The worker hears of the last requests' end in the next step, which has no others here."""
    while engine.scheduler.has_finished_requests():
        engine.llm.llm_engine.engine_core.get_output()


def session(engine: Engine) -> dict[str, Any]:
    """A streaming-input session of two chunks that ask for kv_keep, and its prompt asked again at once."""
    first = session_chunk(engine, "session", Request(TEXT, kv_keep=0.5, max_tokens=8))
    second = session_chunk(engine, first.request_id, Request(TEXT, kv_keep=0.25, max_tokens=8))
    told = [collect(engine, first), collect(engine, second)]
    prompt = list(engine.scheduler.requests[first.request_id].prompt_token_ids)
    engine.core.abort_requests([first.request_id])
    whole = engine.llm.generate(
        {"prompt_token_ids": prompt}, engine.params(Request("", max_tokens=8)), use_tqdm=False
    )[0]
    return {"told": told, "whole": list(whole.outputs[0].token_ids), "tokens": len(prompt)}


def session_chunk(engine: Engine, request_id: str, request: Request) -> Any:
    """A chunk as `AsyncLLM._add_streaming_input_request` makes it, not yet given to the engine."""
    llm = engine.llm.llm_engine
    return llm.input_processor.process_inputs(
        request_id,
        engine.prompt(request),
        engine.params(request),
        supported_tasks=llm.get_supported_tasks(),
        resumable=True,
    )


def collect(engine: Engine, chunk: Any) -> list[int]:
    """The tokens that answer a chunk of a session."""
    engine.core.add_request(*engine.core.preprocess_add_request(chunk))
    tokens: list[int] = []
    for _ in range(100):
        for output in engine.llm.llm_engine.engine_core.get_output().outputs:
            if output.request_id == chunk.request_id:
                tokens += output.new_token_ids
                if output.finish_reason is not None:
                    return tokens
    raise RuntimeError("the session's chunk was not answered")


def overrun(engine: Engine) -> dict[str, Any]:
    """The worker is made to forget that two prompts are pruned: before it sees the one, midway the other."""
    asked = {f"over-{i}": r for i, r in enumerate(resettable())}
    forget = forget_drop(engine)

    def sabotage(step: int) -> None:
        if step == 5:
            forget("over-3")

    for request_id, request in asked.items():
        engine.add(request, request_id)
    forget("over-4")
    answers = engine.drive({}, sabotage)
    return {"answers": [answers[name] for name in asked], **leftovers(engine)}


def forget_drop(engine: Engine) -> Callable[[str], None]:
    """A function that has the worker take a request for a whole one."""

    def forget(request_id: str) -> None:
        internal = engine.internal_id(request_id)
        drops = engine.drops
        if engine.is_v2 and internal not in drops:
            drops = engine.runner.model_state._preempted
        drops[internal] = None

    return forget


def token_ids(engine: Engine) -> dict[str, Any]:
    """Log-probabilities of given ids after each prompt token: by the operator's default, and with kv_keep."""
    # a row for each prompt token behind the first that is scored: 189 tokens, of which the last needs none
    start, scored = 150, [[5, 6, 7]] * 38
    prompt = engine.prompt(Request(QUESTION, (noise(0),)))
    found = []
    for extra_args in (None, engine.params(grid()[0]).extra_args):
        params = engine.params(grid()[0], prompt_logprob_token_ids=scored, extra_args=extra_args)
        params.prompt_logprob_start = start
        found.append(engine.llm.generate(prompt, params, use_tqdm=False)[0].prompt_token_id_logprobs)
    pruned = next(r for r in grid() if r.kv_keep == 0.25)
    return {
        "start": start,
        "default": found[0],
        "whole": found[1],
        "refused": refusal(engine, pruned, prompt_logprob_token_ids=scored),
    }


def graphs(engine: Engine) -> dict[str, Any]:
    """Decode batches replay FULL graphs, acted out; last, since the runner keeps them."""
    from tests.helpers.acted_graphs import ActedGraphs
    from vllm_vtprune.kv_drop.step import KVDropState

    acted = ActedGraphs(engine.runner)
    before = engine.metric("vllm:num_preemptions")
    answers = engine.run(replayed())
    found = {
        "answers": answers,
        "replays": acted.replays,
        "preemptions": engine.metric("vllm:num_preemptions") - before,
    }
    write_slots = KVDropState.write_slots
    # what is not written in place does not reach a replay: proof that the above proves something
    KVDropState.write_slots = lambda self, table, size, slots, blocks: write_slots(  # type: ignore[method-assign]
        self, table, size, slots.clone(), blocks
    )
    acted.capture()
    found["not_in_place"] = engine.run(grid()[6:8])
    KVDropState.write_slots = write_slots  # type: ignore[method-assign]
    return found


def piecewise_graphs(engine: Engine) -> dict[str, Any]:
    """Prompts replay the bands' piecewise graphs, acted out; last, since the runner keeps them."""
    from vllm.v1.worker.gpu.cudagraph_utils import has_compiled_submodule

    from tests.helpers.acted_graphs import ActedGraphs

    seen = has_compiled_submodule(engine.runner.model)
    decoder = engine.runner.model.language_model.model
    # what they are where there are CUDA graphs
    decoder.buffers._graphs = True
    acted = ActedGraphs(engine.runner, piecewise=True)
    engine.llm.reset_prefix_cache()
    return {
        "seen": seen,
        "answers": engine.run(ungated(band_cases())),
        "replays": [band.replays for band in acted.bands],
        "decodes": acted.replays,
    }
