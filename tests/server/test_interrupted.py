# SPDX-License-Identifier: Apache-2.0
"""Clients that go away: what they started is stopped and its memory returned."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.conftest import LiveServer
from tests.helpers.client import CHAT, chat_body, metric, post
from tests.helpers.pictures import scene

pytestmark = pytest.mark.engine

# as long as the context allows: far more than is read before the client hangs up
LONG = {"max_tokens": 800, "min_tokens": 800, "ignore_eos": True}


def idle(server: str, seconds: float = 20) -> bool:
    """Whether the engine soon holds no request and no block of the KV cache."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if metric(server, "vllm:num_requests_running") == metric(server, "vllm:kv_cache_usage_perc") == 0:
            return True
        time.sleep(0.2)
    return False


def read_a_little(server: str) -> float:
    """Requests running when a stream, read for a few lines, is about to be dropped."""
    body = chat_body(scene(), stream=True, **LONG)
    with httpx.stream("POST", server + CHAT, json=body, timeout=60) as response:
        assert response.status_code == 200
        lines = (
            response.iter_lines()
        )  # its end closes the connection, so it must outlive the look at /metrics
        for _ in range(9):
            next(lines)
        return metric(server, "vllm:num_requests_running")


def test_a_stream_cut_by_the_client_frees_its_blocks(live_server: LiveServer) -> None:
    server = live_server.url
    before = metric(server, "vllm:generation_tokens_total")
    with ThreadPoolExecutor(4) as pool:
        assert all(running >= 1 for running in pool.map(read_a_little, [server] * 4))
    assert idle(server)
    assert metric(server, "vllm:generation_tokens_total") - before < 4 * 800
    assert any('"stream":"cut"' in line for line in live_server.log.read_text().splitlines())


def test_a_client_that_does_not_wait_for_the_answer(server: str) -> None:
    before = metric(server, "vllm:generation_tokens_total")
    with pytest.raises(httpx.ReadTimeout):
        post(server, chat_body(scene(), **LONG), timeout=0.5)
    assert idle(server)
    assert metric(server, "vllm:generation_tokens_total") - before < 800
    assert post(server, chat_body(scene())).status_code == 200
