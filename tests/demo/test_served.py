# SPDX-License-Identifier: Apache-2.0
"""The small Qwen3-VL under `vtprune serve`; the other demo model is what tests/server asks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import start_server, stop_server
from tests.helpers.client import answer, chat_body, counts, post
from vllm_vtprune import demo_model
from vtprune_eval.tasks import drawn_questions
from vtprune_loadtest.questions import is_right

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NAME = "demo-qwen3-vl"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = start_server(tmp_path_factory.mktemp("demo") / "server.log", NAME)
    yield server.url
    stop_server(server)


@pytest.mark.parametrize("headers", [{}, {"X-VTPrune-Keep-Ratio": "0.33", "X-VTPrune-KV-Keep": "0.8"}])
def test_it_answers_pruned_and_unpruned(url: str, headers: dict[str, str]) -> None:
    questions, right = drawn_questions("test", 4, 336), 0
    for question in questions.asked:
        picture, model = questions.pictures[question.picture], demo_model.NAMES[NAME].served_name
        response = post(url, chat_body(picture, question=question.text, model=model), headers)
        right += is_right(answer(response), question.answers)
        assert counts(response)["vision_tokens_kept"] == (48 if headers else 144)
    assert right > 0.8 * len(questions.asked) > 16


def test_a_video_is_a_400(url: str) -> None:
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    body = {**chat_body(), "model": demo_model.NAMES[NAME].served_name}
    body["messages"][0]["content"].insert(0, part)
    response = post(url, body)
    assert response.status_code == 400 and "video" in response.json()["error"]["message"]
