# SPDX-License-Identifier: Apache-2.0
"""What a gate in the engine decided on a request, brought into the request's counts and the metrics.

Counts are known when a prompt is rendered, but for a gate's decision, which is told with the last output
of the request (`RequestOutput.kv_transfer_params`, filled by `kv_drop.hooks.scheduler`). It is taken
out there: vLLM's chat route would otherwise send it on.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm_vtprune.contract import KWARG
from vllm_vtprune.kv_drop import metrics
from vllm_vtprune.kv_drop.plan import decided_plan
from vtprune_server.context import RequestContext, current_request


def install_gate_reports(engine_client: Any) -> None:
    """Wrap `AsyncLLM.generate`, through which every route of the front end generates."""
    generate = engine_client.generate

    async def reported(context: RequestContext | None, outputs: Any) -> AsyncGenerator[Any, None]:
        async with aclosing(outputs):
            async for output in outputs:
                told = dict(output.kv_transfer_params or {})
                report = told.pop(KWARG, None)
                if report is not None:
                    output.kv_transfer_params = told or None
                    metrics.GATE_DECISIONS.labels(metrics.LEAVE if report["leaves"] else metrics.STAY).inc()
                    if context is not None:
                        correct(context, report)
                yield output

    def generate_and_report(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        # a stream's generator runs elsewhere, outside the request's context
        return reported(current_request.get(), generate(*args, **kwargs))

    engine_client.generate = generate_and_report


def correct(context: RequestContext, report: dict[str, Any]) -> None:
    """Have a request's counts and plans be as the gate decided.

    Of several answers to one prompt (`n`), each of which is prefilled on its own, the first to end counts.
    """
    number = decided_plan(context.plans, report)
    if number is None:
        return
    before = context.plans[number]
    after = context.plans[number] = before.decided(report["leaves"])
    counts = context.counts
    if counts is None:
        return
    fewer = [a - b for a, b in zip(before.kept_by_layer, after.kept_by_layer, strict=True)]
    counts.kv_tokens_kept -= fewer[0]
    kept = zip(counts.kv_tokens_by_layer, fewer, strict=True)
    counts.kv_tokens_by_layer = tuple(total - less for total, less in kept)
