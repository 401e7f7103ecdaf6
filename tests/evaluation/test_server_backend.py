# SPDX-License-Identifier: Apache-2.0
"""The evaluation against a server: what it sends, what it reads back, what it refuses."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Thread
from typing import Any

import pytest
from PIL import Image

from vllm_vtprune.selection import share_count
from vllm_vtprune.settings import Controls, KVSettings, VisionSettings
from vtprune_eval.backend import RunnerError
from vtprune_eval.measure import evaluate
from vtprune_eval.server_backend import RemoteRunner
from vtprune_eval.setting import BASELINES, Setting
from vtprune_eval.tasks import Question, Questions

N = 144


class FakeServer(ThreadingHTTPServer):
    """Reads headers as the real one does; keeps the share asked for, or as many tokens as the text has.

    A picture has `N` tokens, or with `any_size` one for each of its pixels.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.prunes = True
        self.any_size = False
        self.status = 200
        self.key: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self._refused():
            return
        self._send(200, {"data": [{"id": "some-llava"}]})

    def do_POST(self) -> None:
        if self._refused():
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        controls = Controls.from_headers(list(self.headers.items()))
        fields = {name: value for name, (value, _) in controls.fields.items()}
        self.server.seen.append((body, fields))
        if self.server.status != 200:
            self._send(self.server.status, {"error": {"message": "beyond the cap"}})
            return
        text = body["messages"][0]["content"][1]["text"]
        tokens = kept = _pixels(body) if self.server.any_size else N
        if fields.get("keep_ratio"):
            kept = share_count(fields["keep_ratio"], tokens)
        elif fields.get("aggressiveness"):
            kept = len(text)
        usage: dict[str, Any] = {"prompt_tokens": kept + 10}
        if self.server.prunes:
            usage["vtprune"] = {
                "vision_tokens": tokens,
                "vision_tokens_kept": kept,
                "kv_tokens_kept": kept + 10,
            }
        answer = "wrong" if fields.get("method") == "random" else " right\n"
        self._send(200, {"choices": [{"message": {"content": answer}}], "usage": usage})

    def _refused(self) -> bool:
        refused = self.server.key not in (None, self.headers.get("Authorization", "").removeprefix("Bearer "))
        if refused:
            self._send(401, {"error": "Unauthorized"})
        return refused

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def _pixels(body: dict[str, Any]) -> int:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    with Image.open(BytesIO(b64decode(url.partition(",")[2]))) as picture:
        return picture.width * picture.height


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as made:
        thread = Thread(target=made.serve_forever)
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()


@pytest.fixture
def questions() -> Questions:
    texts = [[f"{'w' * (3 * at + 1)}?" for at in range(picture, picture + 1)] for picture in range(40)]
    asked = [Question(number, "any", text, ("right",)) for number, row in enumerate(texts) for text in row]
    return Questions("forty", [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(40)], asked)


def test_a_setting_travels_as_headers(server: FakeServer, questions: Questions) -> None:
    runner = RemoteRunner(server.url + "/v1/", questions)
    assert runner.name == "some-llava"
    replies = runner.answer(
        Setting(VisionSettings(method="divprune", aggressiveness=0.5), KVSettings(0.5, "vision"))
    )
    assert [reply.text for reply in replies] == ["right"] * 40
    assert [reply.vision_tokens_kept for reply in replies] == [len(q.text) for q in questions.asked]
    body, fields = server.seen[0]
    assert fields == {"method": "divprune", "aggressiveness": 0.5, "kv_keep": (0.5,), "kv_scope": "vision"}
    assert body["temperature"] == 0
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_server_without_a_prune_layer_is_not_asked_to_drop(
    server: FakeServer, questions: Questions
) -> None:
    RemoteRunner(server.url, questions, model="x").answer(Setting())
    assert server.seen[0][1] == {"method": "inflection", "aggressiveness": 0.0}


def test_baselines_keep_exactly_as_many_tokens(server: FakeServer, questions: Questions) -> None:
    setting = Setting(VisionSettings(aggressiveness=0.5))
    runner = RemoteRunner(server.url, questions, model="x")
    counts = [reply.vision_tokens_kept for reply in runner.answer(setting)]
    assert len(set(counts)) == 40
    assert [r.vision_tokens_kept for r in runner.answer(setting.baseline("uniform"))] == counts
    row = evaluate(runner, [setting], lambda line: None)["rows"][1]
    assert row["versus"]["random"]["difference"]["value"] == 1
    assert row["versus"]["uniform"]["difference"]["value"] == 0


def test_a_smaller_picture_is_sent_whole_where_it_has_fewer_tokens(server: FakeServer) -> None:
    server.any_size = True
    pictures = [Image.new("RGB", (40, 20 * (1 + number))) for number in range(3)]
    asked = [Question(number, "any", "w" * 100 * (1 + number), ("right",)) for number in range(3)]
    runner = RemoteRunner(server.url, Questions("three", pictures, asked), model="x")
    assert runner.baselines == BASELINES
    setting = Setting(VisionSettings(aggressiveness=0.5))
    server.seen.clear()
    replies = runner.answer(setting.baseline("downscale"))
    assert all(not fields["aggressiveness"] for _, fields in server.seen[3:])
    for picture, question, reply in zip(pictures, asked, replies, strict=True):
        assert reply.vision_tokens == picture.width * picture.height
        assert reply.vision_tokens_kept == pytest.approx(len(question.text), rel=0.1)
    row = evaluate(runner, [setting], lambda line: None)["rows"][1]
    assert row["versus"]["downscale"]["difference"]["value"] == 0


def test_a_smaller_picture_is_refused_where_it_has_as_many_tokens(
    server: FakeServer, questions: Questions
) -> None:
    runner = RemoteRunner(server.url, questions, model="x")
    assert runner.baselines == ("random", "uniform")
    with pytest.raises(RunnerError, match="as many vision tokens"):
        runner.answer(Setting(VisionSettings(method="downscale", aggressiveness=None, keep_ratio=0.5)))


def test_a_setting_is_asked_for_once(server: FakeServer, questions: Questions) -> None:
    runner = RemoteRunner(server.url, questions, model="x")
    runner.answer(Setting())
    runner.answer(Setting())
    assert len(server.seen) == 40


def test_refusals_are_sentences(server: FakeServer, questions: Questions) -> None:
    runner = RemoteRunner(server.url, questions, model="x")
    with pytest.raises(RunnerError, match="server's"):
        runner.answer(Setting(kv=KVSettings(0.5), prune_layer=2))
    with pytest.raises(RunnerError, match="score"):
        runner.answer(Setting(VisionSettings(aggressiveness=0.5, score="received")))
    server.status = 400
    with pytest.raises(RunnerError, match="400: beyond the cap"):
        runner.answer(Setting())
    server.status, server.prunes = 200, False
    with pytest.raises(RunnerError, match="plugin"):
        runner.answer(Setting())
    with pytest.raises(RunnerError, match="--server"):
        RemoteRunner("http://127.0.0.1:9", questions)


def test_a_missing_key_is_named(server: FakeServer, questions: Questions) -> None:
    server.key = "sk-1"
    with pytest.raises(
        RunnerError, match=r"/v1/models answered 401: give .* --api-key or in \$OPENAI_API_KEY"
    ):
        RemoteRunner(server.url, questions, api_key="sk-2")
    with pytest.raises(RunnerError, match="answered 401: give the server's key"):
        RemoteRunner(server.url, questions, model="some-llava").answer(Setting())
    assert RemoteRunner(server.url, questions, api_key="sk-1").name == "some-llava"
