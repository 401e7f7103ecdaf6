# SPDX-License-Identifier: Apache-2.0
"""What a gate decided, on its way from the engine's last output into counts and metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from fastapi.responses import StreamingResponse

from vllm_vtprune.kv_drop.metrics import GATE_DECISIONS
from vllm_vtprune.kv_drop.plan import PromptPlan, gate_report
from vtprune_server.context import RequestContext, current_request
from vtprune_server.counts import TokenCounts
from vtprune_server.gate import install_gate_reports
from vtprune_server.metrics import KV_TOKENS_KEPT
from vtprune_server.request_log import LoggedRequest
from vtprune_server.responses import annotate

WHOLE = PromptPlan(50, 50, kept_above=(50,))
ASKED = PromptPlan(100, 100, kept_above=(60,), gate=0, protected=20)


class Engine:
    """Answers with one output of text and a last one that tells what a gate decided."""

    def __init__(self, *told: Any) -> None:
        self.told = list(told)

    async def generate(self, prompt: Any) -> AsyncIterator[SimpleNamespace]:
        for told in (None, self.told.pop(0)):
            yield SimpleNamespace(kv_transfer_params=told)


def context() -> RequestContext:
    """Of a request with two prompts, of which the gate decides on the second."""
    found = RequestContext(plans=[WHOLE, ASKED])
    found.add(TokenCounts(80, 80, 150, 150, (150, 110)))
    return found


def decided() -> list[float]:
    return [GATE_DECISIONS.labels(name)._value.get() for name in ("leave", "stay")]  # type: ignore[attr-defined]


async def ask(engine: Engine, request: RequestContext) -> list[Any]:
    token = current_request.set(request)
    try:
        outputs = engine.generate("prompt")
    finally:
        current_request.reset(token)
    # a stream's generator runs where the request is no longer the current one
    return [output.kv_transfer_params async for output in outputs]


async def test_an_exit_is_counted_and_told() -> None:
    engine, request, before = Engine({"vtprune": gate_report(ASKED, True)}), context(), decided()
    install_gate_reports(engine)
    assert await ask(engine, request) == [None, None]
    assert request.counts is not None
    assert (request.counts.kv_tokens_kept, request.counts.kv_tokens_by_layer) == (70, (70, 70))
    assert request.plans == [WHOLE, ASKED.decided(True)]
    assert [a - b for a, b in zip(decided(), before, strict=True)] == [1, 0]


async def test_tokens_that_stay_change_no_count() -> None:
    other = {"connector": 1}
    engine, request = Engine({"vtprune": gate_report(ASKED, False), **other}), context()
    install_gate_reports(engine)
    assert await ask(engine, request) == [None, other]
    assert request.counts == context().counts
    assert request.plans[1].gate is None


async def test_several_answers_to_one_prompt_correct_it_once() -> None:
    """Each is prefilled on its own."""
    engine, request = (
        Engine(*[{"vtprune": gate_report(ASKED, leaves)} for leaves in (True, True, False)]),
        context(),
    )
    install_gate_reports(engine)
    for _ in range(3):
        await ask(engine, request)
    assert request.counts is not None and request.counts.kv_tokens_by_layer == (70, 70)


async def test_a_stream_is_counted_once_the_gate_has_decided() -> None:
    """So that counters add up to the usage that its last event tells."""
    engine, request = Engine({"vtprune": gate_report(ASKED, True)}), context()
    install_gate_reports(engine)
    record = LoggedRequest(request, None)

    async def events() -> AsyncIterator[str]:
        await ask(engine, request)
        yield 'data: {"usage":{}}\n\n'

    before = KV_TOKENS_KEPT._value.get()
    response = annotate(StreamingResponse(events()), request.counts, record)
    # headers are sent before anything is decided
    assert response.headers["X-VTPrune-KV-Tokens-Kept"] == "150"
    assert KV_TOKENS_KEPT._value.get() == before
    (event,) = [event async for event in response.body_iterator]
    assert '"kv_tokens_kept_by_layer":[70,70]' in event
    assert KV_TOKENS_KEPT._value.get() == before + 70
