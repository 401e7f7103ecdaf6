# SPDX-License-Identifier: Apache-2.0
"""A prompt whose image the engine lost is sent again with the image, and nothing of it is seen outside."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence
from vllm.inputs import mm_input
from vllm.multimodal.inputs import MultiModalKwargsItems

from vtprune_server import metrics
from vtprune_server.resend import install_resend, make_resendable


def prompt_with(image: Any) -> dict[str, Any]:
    images = MultiModalKwargsItems({"image": [image]})
    return {**mm_input([1, 2], images, {"image": ["hash"]}, {"image": []}, prompt="text")}


KNOWN, WITH_DATA = prompt_with(None), prompt_with("pixels")


def output(*tokens: int, finish: str | None = None) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=list(tokens), finish_reason=finish)])


class Engine:
    """Answers 7, 8 to prompts with data; forgets `lost` times what a prompt names by hash alone."""

    def __init__(self, lost: int) -> None:
        self.lost, self.seen, self.closed = lost, list[Any](), 0

    async def generate(self, prompt: Any, params: str, *, request_id: str) -> AsyncGenerator[Any, None]:
        self.seen.append((dict(prompt), params, request_id))
        try:
            if prompt["mm_kwargs"]["image"] == [None] and self.lost:
                self.lost -= 1
                yield output(finish="error")
                return
            yield output(7)
            yield output(8, finish="stop")
        finally:
            self.closed += 1


def ask(engine: Engine, prompt: dict[str, Any]) -> list[list[int]]:
    async def collect() -> list[list[int]]:
        outputs = engine.generate(prompt, "greedy", request_id="r")
        return [one.outputs[0].token_ids async for one in outputs]

    install_resend(engine)
    return asyncio.run(collect())


def known(*renders: dict[str, Any]) -> dict[str, Any]:
    waiting = list(renders)

    async def render() -> dict[str, Any]:
        return resendable({**waiting.pop(0)}, render)

    return resendable(prompt_with(None), render)


def resendable(prompt: dict[str, Any], render: Any) -> dict[str, Any]:
    make_resendable(prompt, render)
    return prompt


def resent() -> float:
    return metrics.RESENT._value.get()


def test_a_lost_image_is_sent_again_with_its_data() -> None:
    engine, before = Engine(lost=1), resent()
    assert ask(engine, known(WITH_DATA)) == [[7], [8]]
    assert [seen[0]["mm_kwargs"]["image"] for seen in engine.seen] == [[None], ["pixels"]]
    assert engine.seen[1] == ({**KNOWN, **WITH_DATA}, "greedy", "r"), "all else as it was"
    assert engine.closed == 2
    assert resent() == before + 1


def test_an_image_lost_twice_is_sent_a_third_time() -> None:
    engine = Engine(lost=2)
    assert ask(engine, known(KNOWN, WITH_DATA)) == [[7], [8]]
    assert len(engine.seen) == 3


def test_an_engine_that_goes_on_losing_it_is_believed() -> None:
    engine = Engine(lost=9)
    assert ask(engine, known(KNOWN, KNOWN, KNOWN)) == [[]]
    assert len(engine.seen) == 3


def test_a_known_image_that_is_there_is_sent_once() -> None:
    engine = Engine(lost=0)
    assert ask(engine, known(WITH_DATA)) == [[7], [8]]
    assert len(engine.seen) == 1


@pytest.mark.parametrize("images", [{"image": ["pixels"]}, {"image": []}, {}])
def test_what_carries_its_data_is_left_alone(images: Any) -> None:
    async def never() -> dict[str, Any]:
        raise AssertionError

    kwargs = MultiModalKwargsItems(images)
    prompt = {"mm_kwargs": kwargs}
    make_resendable(prompt, never)
    assert prompt["mm_kwargs"] is kwargs


def test_a_known_video_beside_a_picture_is_resendable() -> None:
    async def again() -> dict[str, Any]:
        return WITH_DATA

    prompt: dict[str, Any] = {"mm_kwargs": MultiModalKwargsItems({"image": ["pixels"], "video": [None]})}
    make_resendable(prompt, again)
    assert prompt["mm_kwargs"].render is again


def test_a_beam_is_sent_again_with_the_tokens_it_has_grown() -> None:
    engine, prompt = Engine(lost=1), known(WITH_DATA)
    beam = BeamSearchSequence(orig_prompt=prompt, tokens=[1, 2, 3], logprobs=[])  # type: ignore[arg-type]
    assert ask(engine, beam.get_prompt()) == [[7], [8]]
    assert [seen[0]["prompt_token_ids"] for seen in engine.seen] == [[1, 2, 3], [1, 2, 3]]
    assert engine.seen[1][0]["mm_kwargs"]["image"] == ["pixels"]


def test_an_error_after_the_first_token_is_passed_on() -> None:
    class Breaking(Engine):
        async def generate(self, prompt: Any, params: str, *, request_id: str) -> AsyncGenerator[Any, None]:
            self.seen.append(prompt)
            yield output(7)
            yield output(finish="error")

    engine = Breaking(lost=0)
    assert ask(engine, known(WITH_DATA)) == [[7], []]
    assert len(engine.seen) == 1


def test_closing_the_answer_closes_the_engines() -> None:
    engine = Engine(lost=1)

    async def cut() -> None:
        outputs = engine.generate(known(WITH_DATA), "greedy", request_id="r")
        await anext(outputs)
        await outputs.aclose()

    install_resend(engine)
    asyncio.run(cut())
    assert engine.closed == len(engine.seen) == 2
