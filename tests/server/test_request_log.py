# SPDX-License-Identifier: Apache-2.0
"""One JSON line per request, which says what was done and not what was said."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from tests.conftest import LiveServer
from tests.helpers.client import CHAT, chat_body, post
from tests.helpers.pictures import data_url, noise, scene

pytestmark = pytest.mark.engine


def lines(live: LiveServer, request_id: str, count: int = 1) -> list[dict[str, Any]]:
    """The log's lines about a request; waits, since a stream's comes after its last byte."""
    for _ in range(100):
        found = [
            json.loads(line)
            for line in live.log.read_text(errors="replace").splitlines()
            if line.startswith("{") and request_id in line
        ]
        if len(found) >= count:
            break
        time.sleep(0.05)
    return found


def test_id_settings_counts_and_outcome(live_server: LiveServer) -> None:
    body = chat_body(scene(), vtprune={"keep_ratio": 0.25})
    response = post(live_server.url, body, {"X-Request-Id": "log-test-1"})
    assert response.headers["X-Request-Id"] == "log-test-1"
    assert "log-test-1" in response.json()["id"]
    (line,) = lines(live_server, "log-test-1")
    assert line["event"] == "request" and line["route"] == CHAT and line["status"] == 200
    assert line["settings"]["preset"] == "custom"
    assert line["settings"]["keep_ratio"] == 0.25 and line["settings"]["method"] == "inflection"
    assert {k: line[k] for k in response.json()["usage"]["vtprune"]} == response.json()["usage"]["vtprune"]
    assert 0 < line["seconds"] < 120


def test_a_request_without_an_id_is_given_one(live_server: LiveServer) -> None:
    response = post(live_server.url, chat_body(scene()))
    assert len(lines(live_server, response.headers["X-Request-Id"])) == 1


def test_refused_requests_are_logged_with_their_status(live_server: LiveServer) -> None:
    post(live_server.url, chat_body("http://127.0.0.1/x.png"), {"X-Request-Id": "log-test-2"})
    (line,) = lines(live_server, "log-test-2")
    assert line["status"] == 400 and line["error"] == "PrivateAddressError"
    post(live_server.url, chat_body("http://nowhere.invalid/x"), {"X-Request-Id": "log-test-3"})
    assert lines(live_server, "log-test-3")[0]["status"] == 422


def test_streams_are_logged_at_their_end(live_server: LiveServer) -> None:
    with httpx.stream(
        "POST",
        live_server.url + CHAT,
        json=chat_body(scene(), stream=True),
        headers={"X-Request-Id": "log-test-4"},
        timeout=60,
    ) as response:
        response.read()
    (line,) = lines(live_server, "log-test-4")
    assert line["stream"] == "done" and line["vision_tokens"] == 144


def test_neither_picture_nor_prompt_nor_url_is_logged(live_server: LiveServer) -> None:
    image, secret = noise(4711), "zanzibar"
    post(live_server.url, chat_body(image, question=f"{secret} what ?"))
    post(live_server.url, chat_body(image, question=f"{secret} what ?", max_tokens=10**6))
    post(live_server.url, chat_body(f"http://127.0.0.1/{secret}.png"))
    post(live_server.url, chat_body(f"http://{secret}.invalid/{secret}.png"))
    post(live_server.url, chat_body(f"data:image/png;base64,{secret}"))
    post(live_server.url, {"messages": [{"role": secret}]})
    post(live_server.url, chat_body(image), {"X-VTPrune-Method": secret})
    log = live_server.log.read_text(errors="replace")
    assert secret not in log
    assert data_url(image)[100:160] not in log
