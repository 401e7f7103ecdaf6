# SPDX-License-Identifier: Apache-2.0
"""Conversations on an engine whose later turns go on from what the first one kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tests.helpers.kv_cases import QUESTION, talks
from tests.helpers.kv_engine import Engine
from tests.helpers.kv_events import leftovers
from tests.helpers.pictures import noise
from tests.reference import Request

_ASKED = ("\nUSER: and what shape is it ? ASSISTANT:", "\nUSER: is that so ? where is it ? ASSISTANT:")


def asked_on(
    engine: Engine, before: Request, answer: dict[str, Any], text: str, images: tuple[Any, ...] = ()
) -> Request:
    """The turn after one that was answered, with a picture of its own where there is one."""
    tokenizer = engine.llm.get_tokenizer()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return replace(
        before,
        images=(*before.images, *images),
        then=(*before.then, *answer["tokens"], *ids),
        first_turn=before.first_turn or answer["prompt_tokens"],
    )


def conversations(engine: Engine) -> dict[str, Any]:
    """Three turns each, half of them at once; then the last turn twice, first with nothing in the cache.

    `asked` and `told` are by turn.
    """
    found: dict[str, Any] = {"asked": [[], [], []], "told": [[], [], []], "again": [], "at_last": []}
    half = len(talks()) // 2
    for asked in (talks()[:half], talks()[half:]):
        for turn, text in enumerate((*_ASKED, "")):
            told = engine.run(asked)
            found["asked"][turn] += asked
            found["told"][turn] += told
            if text:
                asked = [asked_on(engine, r, a, text) for r, a in zip(asked, told, strict=True)]
        engine.llm.reset_prefix_cache()
        found["again"] += engine.run(asked)
        found["at_last"] += engine.run(asked)
    return found


def otherwise(engine: Engine, found: dict[str, Any]) -> dict[str, Any]:
    """What must not be gone on from: refused, another question, other shares; and a later picture."""
    (first, second, _), told = found["asked"], found["told"]
    one = first[0]
    other = replace(one, prompt=QUESTION.replace("color", "form"))
    engine.llm.reset_prefix_cache()
    engine.run([one])
    asked = [
        replace(second[0], kv_reuse=False),
        other,
        replace(second[0], kv_keep=0.25),
        second[0],
        asked_on(engine, one, told[0][0], "\nUSER: <image> and this ? ASSISTANT:", (noise(70),)),
        # again, as it was first asked
        one,
    ]
    return {"asked": asked, "told": [engine.run([request])[0] for request in asked]}


def preempted(engine: Engine, found: dict[str, Any]) -> dict[str, Any]:
    """Second turns that together outgrow the cache; one is aborted midway and asked again."""
    engine.llm.reset_prefix_cache()
    first = [Request(QUESTION, (noise(80 + i),), kv_keep=0.6, max_tokens=20) for i in range(8)]
    told = engine.run(first)
    asked = [
        replace(asked_on(engine, r, a, _ASKED[0]), max_tokens=90) for r, a in zip(first, told, strict=True)
    ]

    def abort(step: int) -> None:
        if step == 20:
            engine.llm.llm_engine.abort_request(["turn-3"])

    before = engine.metric("vllm:num_preemptions")
    answers = engine.drive({f"turn-{i}": r for i, r in enumerate(asked)}, abort)
    return {
        "asked": asked,
        "told": [None if i == 3 else answers[f"turn-{i}"] for i in range(len(asked))],
        "again": engine.run([asked[3]])[0],
        "preemptions": engine.metric("vllm:num_preemptions") - before,
        **leftovers(engine),
    }


def reset(engine: Engine, asked: Sequence[Request]) -> dict[str, Any]:
    """The prefix cache is reset under second turns that go on from their first."""

    def reset_at(step: int) -> None:
        if step in (3, 12):
            engine.llm.reset_prefix_cache(reset_running_requests=True)

    before = engine.metric("vllm:num_preemptions")
    answers = engine.drive({f"reset-{i}": r for i, r in enumerate(asked)}, reset_at)
    return {
        "told": [answers[f"reset-{i}"] for i in range(len(asked))],
        "preemptions": engine.metric("vllm:num_preemptions") - before,
        **leftovers(engine),
    }
