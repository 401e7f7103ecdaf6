# SPDX-License-Identifier: Apache-2.0
"""The question at the front door: the text of the last user turn reaches the methods that read it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.client import chat_body, counts, messages_body, metric, post
from tests.helpers.pictures import noise
from vllm_vtprune.policy import PrunePolicy
from vllm_vtprune.settings import Controls
from vtprune_server.question import question_of, with_question

AND = {"type": "text", "text": "and"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    "messages,question",
    [
        ([], ""),
        ([{"role": "system", "content": "be brief"}], ""),
        ([{"role": "user", "content": "what ?"}], "what ?"),
        (
            [
                {"role": "user", "content": [IMAGE, {"type": "text", "text": "first ?"}]},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": [AND, IMAGE, {"type": "input_text", "text": "now ?"}]},
                {"role": "assistant", "content": "begun"},
            ],
            "and now ?",
        ),
        ([SimpleNamespace(role="user", content=[SimpleNamespace(text="a ?"), "b"])], "a ? b"),
        ([{"role": "user", "content": None}], ""),
        ([{"role": "user"}], ""),
    ],
)  # fmt: skip
def test_the_text_parts_of_the_last_user_turn(messages: list[Any], question: str) -> None:
    assert question_of(messages) == question


def test_it_is_no_part_of_settings_that_do_not_read_it_and_of_no_log() -> None:
    policy = PrunePolicy()
    plain = policy.resolve(Controls.from_mapping({"preset": "balanced"}))
    assert with_question(plain, "what ?") is plain
    asked = with_question(
        policy.resolve(Controls.from_mapping({"keep_ratio": 0.2, "method": "cdpruner"})), "what ?"
    )
    assert asked.vision.question == "what ?"
    assert "what" not in str(asked.as_dict())


@pytest.mark.engine
def test_two_questions_about_a_picture_run_the_tower_once(server: str) -> None:
    settings = {"method": "cdpruner", "keep_ratio": 0.2}
    questions = ("what color is the circle ?", "how many red squares are there ?")

    def read() -> list[float]:
        names = ("tower_seconds_count", "tower_cache_misses_total", "tower_cache_hits_total")
        return [metric(server, f"vtprune_{name}") for name in names]

    def grown(body: dict[str, Any], path: str = "/v1/chat/completions") -> tuple[list[float], float]:
        before, reused = read(), metric(server, "vllm:mm_cache_hits_total")
        response = post(server, {**body, "vtprune": settings}, path=path)
        assert response.status_code == 200, response.text
        assert int(response.headers["X-VTPrune-Vision-Tokens-Kept"]) == 29
        after, again = read(), metric(server, "vllm:mm_cache_hits_total")
        return [b - a for a, b in zip(before, after, strict=True)], again - reused

    picture = noise(77_001)
    assert grown(chat_body(picture, question=questions[0])) == ([1, 1, 0], 0)
    assert grown(chat_body(picture, question=questions[1])) == ([0, 0, 1], 0)
    # the same question again is the same picture to vLLM, whatever its spaces and its route
    assert grown(chat_body(picture, question=questions[1])) == ([0, 0, 0], 1)
    messages = messages_body(picture, questions[1]) | {"model": "vtprune-demo"}
    assert grown(messages, "/v1/messages") == ([0, 0, 0], 1)
    # a method that does not read it has one entry for both
    unread = [
        counts(post(server, chat_body(picture, question=q), {"X-VTPrune-Keep-Ratio": "0.2"}))
        for q in questions
    ]
    assert unread[0]["vision_tokens_kept"] == unread[1]["vision_tokens_kept"] == 29
