# SPDX-License-Identifier: Apache-2.0
"""The middleware around every route, each around a small application of its own."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from vtprune_server.middleware.auth import EveryRouteAuthentication
from vtprune_server.middleware.body_limit import BodyLimitMiddleware
from vtprune_server.middleware.drain import DrainMiddleware, RequestsInFlight, drain_before_shutdown
from vtprune_server.middleware.quiet_errors import QuietErrors
from vtprune_server.middleware.request_ids import RequestIds

SECRET = "secret"  # a traceback shows lines of code: they must name it, not spell it


def application() -> FastAPI:
    app = FastAPI()

    @app.post("/echo")
    async def echo(request: Request) -> Any:
        return {"size": len(await request.body()), "id": request.headers.get("x-request-id")}

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError(SECRET)

    @app.get("/health")
    async def health() -> None:
        return None

    @app.get("/breaks-off")
    async def breaks_off() -> StreamingResponse:
        async def events() -> AsyncIterator[bytes]:
            yield b"one"
            raise KeyError(SECRET)

        return StreamingResponse(events())

    return app


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.usefixtures("withheld")
async def test_an_unforeseen_error_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    app = application()
    app.add_middleware(QuietErrors)
    async with client(app) as http:
        response = await http.get("/broken")
    assert response.status_code == 500
    assert "secret" not in response.text + caplog.text
    assert "error in GET /broken" in caplog.text and "KeyError" in caplog.text


async def test_the_operator_may_ask_for_the_text(caplog: pytest.LogCaptureFixture) -> None:
    app = application()
    app.add_middleware(QuietErrors)
    async with client(app) as http:
        assert "secret" not in (await http.get("/broken")).text
    assert "secret" in caplog.text


@pytest.mark.usefixtures("withheld")
async def test_an_answer_that_breaks_off_is_not_answered_twice(caplog: pytest.LogCaptureFixture) -> None:
    app = application()
    app.add_middleware(QuietErrors)
    sent: list[str] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        await asyncio.sleep(60)

    scope = {"type": "http", "method": "GET", "path": "/breaks-off", "headers": [], "query_string": b""}
    await app(scope, receive, send)
    assert sent[0] == "http.response.start" and sent.count("http.response.start") == 1
    assert "secret" not in caplog.text
    assert "error in GET /breaks-off" in caplog.text


@pytest.mark.parametrize("given,kept", [("mine", True), ("x" * 128, True), ("x" * 129, False), (None, False)])
async def test_every_request_has_an_id(given: str | None, kept: bool) -> None:
    app = application()
    app.add_middleware(RequestIds)
    async with client(app) as http:
        response = await http.post("/echo", headers={"X-Request-Id": given} if given else {})
    (answered,) = response.headers.get_list("x-request-id")
    assert answered == response.json()["id"]
    assert (answered == given) is kept and 0 < len(answered) <= 128


async def test_the_id_is_left_to_vllm_where_it_answers_with_it() -> None:
    app = application()
    app.add_middleware(RequestIds, answer=False)
    async with client(app) as http:
        response = await http.post("/echo")
    assert "x-request-id" not in response.headers and response.json()["id"]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("size,status", [(0, 200), (1000, 200), (1001, 413)])
async def test_a_body_up_to_the_limit(size: int, status: int, chunked: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, size, 100):
            yield b"x" * min(100, size - start)

    app = application()
    app.add_middleware(BodyLimitMiddleware, max_bytes=1000)
    async with client(app) as http:
        response = await http.post("/echo", content=chunks() if chunked else b"x" * size)
    assert response.status_code == status
    if status == 200:
        assert response.json()["size"] == size


@pytest.mark.parametrize(
    "path,key,status",
    [
        ("/echo", "k", 200),
        ("/echo", "l", 401),
        ("/echo", None, 401),
        ("/health", None, 200),
        ("/healthy", None, 401),
        ("/health/../echo", None, 401),
        ("/playground/x", None, 404),
    ],
)
async def test_the_key(path: str, key: str | None, status: int) -> None:
    app = application()
    app.add_middleware(EveryRouteAuthentication, tokens=["k"])
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app)
    request = httpx.Request("POST" if "echo" in path else "GET", "http://test/", headers=headers)
    request.url = httpx.URL(scheme="http", host="test", raw_path=path.encode())
    response = await transport.handle_async_request(request)
    assert response.status_code == status


def test_draining_waits_for_the_requests_in_flight() -> None:
    in_flight = RequestsInFlight()
    assert in_flight.begin() and in_flight.begin()
    in_flight.end()
    assert not in_flight.drain(timeout=0.05)
    assert not in_flight.begin(), "no more are taken"
    threading.Timer(0.1, in_flight.end).start()
    assert in_flight.drain(timeout=10)


async def test_a_draining_server_sends_new_requests_away() -> None:
    app, in_flight = application(), RequestsInFlight()
    app.add_middleware(DrainMiddleware, in_flight=in_flight)
    async with client(app) as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/breaks-off-not")).status_code == 404
        with pytest.raises(KeyError):
            await http.get("/broken")
        assert in_flight.drain(timeout=0), "every request was counted out, the broken one too"
        refused = await http.get("/health")
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert refused.json()["error"]["code"] == 503


@pytest.mark.parametrize("timeout", [None, 0, 5])
def test_the_engine_is_shut_down_after_the_drain(timeout: float | None) -> None:
    calls: list[Any] = []
    in_flight = RequestsInFlight()
    engine = SimpleNamespace(shutdown=lambda timeout=None: calls.append((in_flight.draining, timeout)))
    drain_before_shutdown(engine, in_flight)
    engine.shutdown(timeout=timeout)
    ((draining, left),) = calls
    assert draining and (left is None) == (timeout is None)
    assert timeout is None or 0 <= left <= timeout


def test_the_request_log_can_be_switched_off() -> None:
    from vtprune_server.request_log import configure_request_log

    requests = logging.getLogger("vtprune.requests")
    for enabled in (True, False, True):
        configure_request_log(enabled)
        assert requests.disabled is not enabled
    assert [type(handler) for handler in requests.handlers].count(logging.StreamHandler) == 1
