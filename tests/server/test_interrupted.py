# SPDX-License-Identifier: Apache-2.0
"""Clients that go away: what they started is stopped and its memory returned.

The engine stands still while its client goes away, so that it is in the midst of an answer however fast or
slow the machine is.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import LiveServer
from tests.helpers.client import CHAT, chat_body, metric, post
from tests.helpers.pictures import scene

pytestmark = pytest.mark.engine

# as long as the context allows: far more than is read before the client hangs up
LONG = {"max_tokens": 800, "min_tokens": 800, "ignore_eos": True}
# how long to wait for what takes a moment on an idle machine
PATIENCE = 120


@contextmanager
def standing_still(server: LiveServer) -> Iterator[None]:
    """The engine's processes are suspended; the API process goes on."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    assert processes
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def idle(server: str) -> bool:
    """Whether the engine soon holds no request and no block of the KV cache."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if metric(server, "vllm:num_requests_running") == metric(server, "vllm:kv_cache_usage_perc") == 0:
            return True
        time.sleep(0.2)
    return False


def end_of(server: LiveServer, request_id: str) -> dict[str, Any]:
    """The request's line in the log, which it gets when the API process is done with it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for line in server.log.read_text().splitlines():
            if request_id in line and '"event":"request"' in line:
                end: dict[str, Any] = json.loads(line)
                return end
        time.sleep(0.1)
    raise TimeoutError(f"request {request_id} does not end")


def cut_streams(server: LiveServer) -> list[dict[str, Any]]:
    """The ends of four streams that were read for a line and dropped."""
    ids = [uuid.uuid4().hex for _ in range(4)]
    with ExitStack() as streams:
        lines = []  # the end of an iterator closes its connection
        for request_id in ids:
            stream = httpx.stream(
                "POST",
                server.url + CHAT,
                json=chat_body(scene(), stream=True, **LONG),
                headers={"X-Request-Id": request_id},
                timeout=PATIENCE,
            )
            response = streams.enter_context(stream)
            assert response.status_code == 200
            lines.append(response.iter_lines())
            next(lines[-1])
        with standing_still(server):
            streams.close()
            return [end_of(server, request_id) for request_id in ids]


def test_a_stream_cut_by_the_client_frees_its_blocks(live_server: LiveServer) -> None:
    server = live_server.url
    while True:
        before = metric(server, "vllm:generation_tokens_total")
        # a stream that ended before the engine stood still was not cut: then all are asked again
        if all(end.get("stream") == "cut" for end in cut_streams(live_server)):
            break
        assert idle(server)
    assert idle(server)
    assert metric(server, "vllm:generation_tokens_total") - before < 4 * 800


def test_a_client_that_does_not_wait_for_the_answer(live_server: LiveServer) -> None:
    server, request_id = live_server.url, uuid.uuid4().hex
    before = metric(server, "vllm:generation_tokens_total")
    with standing_still(live_server):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                server + CHAT,
                json=chat_body(scene(), **LONG),
                headers={"X-Request-Id": request_id},
                timeout=httpx.Timeout(PATIENCE, read=0.5),
            )
        end_of(live_server, request_id)
    assert idle(server)
    assert metric(server, "vllm:generation_tokens_total") - before < 800
    assert post(server, chat_body(scene())).status_code == 200
