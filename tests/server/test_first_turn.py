# SPDX-License-Identifier: Apache-2.0
"""How long a chat's first turn was: in vLLM's own renderer of the embedded model, and in drawn prompts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.renderers.registry import renderer_from_config

from tests.conftest import DEMO_MODEL, MODEL_NAME
from tests.helpers.kv_config import config
from tests.helpers.pictures import data_url, scene
from vllm_vtprune.context import plugin_context
from vtprune_server.context import RequestContext, current_request
from vtprune_server.engine_load import auto_level
from vtprune_server.first_turn import beginning, first_answer
from vtprune_server.kv_plan import KVPlanner
from vtprune_server.renderer import PrunedOnlineRenderer

BLOCK = 16
SYSTEM = {"role": "system", "content": "be brief ."}
ANSWER = {"role": "assistant", "content": "red"}
PLACE = 3


def user(text: str, *images: Any) -> dict[str, Any]:
    pictures = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}] if images else text}


SEEN = user("what color is the circle ?", scene())
NEXT = user("and what shape is the other one ?")


@pytest.fixture(scope="module")
def renderer() -> PrunedOnlineRenderer:
    policy = {"kv_reuse": True, "default_preset": "balanced"}
    vllm_config = config(DEMO_MODEL, policy=policy, block_size=BLOCK)
    model_config = vllm_config.model_config
    online = OnlineRenderer(
        model_config,
        renderer_from_config(vllm_config),
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
    )
    context = plugin_context(model_config)
    auto = auto_level(context.policy)
    return PrunedOnlineRenderer.install(online, context, KVPlanner.of(vllm_config), {}, auto)


async def render(
    renderer: PrunedOnlineRenderer, *messages: dict[str, Any], **fields: Any
) -> tuple[list[int], dict[str, Any], Any]:
    """The prompt's tokens, what the engine is told, and what the response will tell."""
    vtprune = fields.pop("vtprune", None)
    request = ChatCompletionRequest(messages=list(messages), model=MODEL_NAME, **fields)
    context = RequestContext(body=vtprune)
    token = current_request.set(context)
    try:
        _, (prompt,) = await renderer.preprocess_chat(
            request,
            request.messages,
            default_template=None,
            default_template_content_format="auto",
            default_template_kwargs=None,
        )
    finally:
        current_request.reset(token)
    assert request.vllm_xargs is not None and context.counts is not None
    told: Any = request.vllm_xargs["vtprune"]
    return list(prompt["prompt_token_ids"]), told, context.counts


@pytest.mark.parametrize("before", [[], [SYSTEM], [user("hello"), ANSWER]], ids=["alone", "system", "behind"])
async def test_later_turns_know_how_long_the_first_was(
    renderer: PrunedOnlineRenderer, before: list[dict[str, Any]]
) -> None:
    """The first with a picture; presets drop there whatever follows, and no token more."""
    first, told, counts = await render(renderer, *before, SEEN)
    assert told == {"kv_keep": 0.5, "kv_scope": "all"}
    messages = [*before, SEEN, ANSWER, NEXT]
    for added in ([], [ANSWER, user("and here ?", scene(8), scene(9)), ANSWER, NEXT]):
        messages += added
        later, told, later_counts = await render(renderer, *messages)
        assert told == {"kv_keep": 0.5, "kv_scope": "all", "kv_first_turn": len(first)}
        assert later[: len(first)] == first
        dropped = counts.kv_tokens - counts.kv_tokens_kept
        assert dropped == later_counts.kv_tokens - later_counts.kv_tokens_kept > 0
        assert dropped % BLOCK == 0 and later_counts.kv_tokens == len(later)


async def test_two_pictures_in_the_first_turn(renderer: PrunedOnlineRenderer) -> None:
    both = user("which is larger ?", scene(1), scene(2))
    first, _, _ = await render(renderer, both)
    _, told, _ = await render(renderer, both, ANSWER, NEXT)
    assert told["kv_first_turn"] == len(first)


async def test_a_chat_without_a_picture_goes_on_from_its_first_turn(renderer: PrunedOnlineRenderer) -> None:
    first, _, _ = await render(renderer, user("hello"), vtprune={"kv_keep": 0.3})
    _, told, _ = await render(renderer, user("hello"), ANSWER, NEXT, ANSWER, NEXT, vtprune={"kv_keep": 0.3})
    assert (told["kv_keep"], told["kv_first_turn"]) == (0.3, len(first))


async def test_a_first_picture_in_a_later_turn_is_dropped_from(renderer: PrunedOnlineRenderer) -> None:
    _, told, counts = await render(renderer, user("hello"), ANSWER, SEEN)
    assert told == {"kv_keep": 0.5, "kv_scope": "all"}
    assert counts.kv_tokens_kept < counts.kv_tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"vtprune": {"kv_reuse": "off"}},
        {"vtprune": {"kv_reuse": "off", "kv_keep": 0.4}},
        {"vtprune": {"kv_keep": 0}},
        {"vtprune": {"preset": "off"}},
        {"prompt_logprobs": 1},
        {"truncate_prompt_tokens": 180},
        {"chat_template": "{% for m in messages %}{{ m.content }} of {{ messages | length }} {% endfor %}"},
    ],
    ids=lambda fields: " ".join(map(str, fields.get("vtprune", fields))),
)
async def test_other_later_turns_are_as_without_the_setting(
    renderer: PrunedOnlineRenderer, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, an exit, nothing dropped, what no pruned prompt can do; a cut prompt, an odd template."""
    found = await render(renderer, SEEN, ANSWER, NEXT, **fields)
    monkeypatch.setattr(renderer, "_as_its_first_turn", lambda *args: None)
    assert found == await render(renderer, SEEN, ANSWER, NEXT, **fields)
    assert "kv_first_turn" not in found[1]


def test_which_answer_is_the_first_turns() -> None:
    hello, image = user("hello"), {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
    assert first_answer([hello]) is None
    assert first_answer([hello, ANSWER, hello]) == 0
    assert first_answer([hello, ANSWER, image]) is None
    assert first_answer([hello, ANSWER, image, ANSWER, hello]) == 1
    assert first_answer([image, ANSWER, hello, ANSWER, image]) == 0
    # an answer to be continued is none
    assert first_answer([image, ANSWER]) is None


pieces = st.lists(st.integers(4, 9), min_size=1, max_size=6)


@given(st.lists(st.tuples(pieces, st.integers(1, 30)), max_size=3), pieces, st.data())
def test_a_beginning_is_found_whatever_its_pictures_take_up(images, end, data):
    """The template writes as many tokens where each picture goes; the prompt has as many as its picture."""
    written = data.draw(st.integers(1, 3))
    later = data.draw(st.lists(st.tuples(pieces, st.integers(1, 30)), max_size=2))
    first: list[int] = []
    prompt: list[int] = []
    places = []
    for number, (text, length) in enumerate([*images, (end, 0), *later, ([5], 0)]):
        if number <= len(images):
            first += text + [PLACE] * (written if length else 0)
        prompt += text
        if length:
            places.append((len(prompt), length))
            prompt += [PLACE] * length
        if number == len(images):
            expected = len(prompt)
    assert beginning(first, prompt, places) == expected
    # a token of the end's is another
    assert beginning([*first[:-1], 99], prompt, places) == 0
