# SPDX-License-Identifier: Apache-2.0
"""What runs in Ray Serve's proxies and before a replica's app, on real sockets, without Ray."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.helpers.client import chat_body, messages_body
from tests.helpers.pictures import scene
from vtprune_server.ray_front import ReplicaFront
from vtprune_server.ray_proxy import ServeProxyMiddleware, picture_key

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The app under uvicorn, which is what Serve's proxies are."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """What arrived, the way Serve's proxy hands it on."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = [[name.decode(), value.decode()] for name, value in scope["headers"]]
    await JSONResponse({"headers": headers, "body": body.decode()})(scope, receive, send)


@pytest.fixture(scope="module")
def echoing() -> Iterator[str]:
    with serving(ServeProxyMiddleware(echo)) as url:
        yield url


def arrived(response: httpx.Response, header: str) -> list[str]:
    return [value for name, value in response.json()["headers"] if name == header]


def test_the_same_picture_has_the_same_key_on_every_route_and_another_one_another() -> None:
    chat = json.dumps(chat_body(scene())).encode()
    other = json.dumps(chat_body(scene(9))).encode()
    messages = json.dumps(messages_body(scene())).encode()
    spaced = json.dumps(chat_body(scene(), question="something else ?"), indent=2).encode()
    assert picture_key(chat) == picture_key(messages) == picture_key(spaced) != picture_key(other)
    assert picture_key(json.dumps(chat_body()).encode()) is None


def test_a_picture_becomes_the_session_id_and_the_body_arrives_whole(echoing: str) -> None:
    body = json.dumps(chat_body(scene())).encode()
    whole = httpx.post(echoing, content=body)
    chunks = httpx.post(echoing, content=iter([body[:700], body[700:5000], body[5000:]]))
    for response in (whole, chunks):
        assert response.json()["body"].encode() == body
        assert arrived(response, "x-session-id") == [picture_key(body)]


def test_a_clients_own_session_id_is_left_alone(echoing: str) -> None:
    response = httpx.post(echoing, json=chat_body(scene()), headers={"X-Session-Id": "mine"})
    assert arrived(response, "x-session-id") == ["mine"]


@pytest.mark.parametrize("own", [None, "", "x" * 129])
def test_a_request_without_a_usable_id_gets_one(echoing: str, own: str | None) -> None:
    response = httpx.get(echoing, headers={} if own is None else {"X-Request-Id": own})
    (given,) = arrived(response, "x-request-id")
    assert len(given) == 32


def test_a_usable_id_is_kept(echoing: str) -> None:
    assert arrived(httpx.get(echoing, headers={"X-Request-Id": "mine"}), "x-request-id") == ["mine"]


def is_lost(error: Any) -> bool:
    return bool(error["code"] == 503 and "again" in error["message"])


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """Serve's proxy whose replica was lost: it answers nothing."""
    await receive()


async def only_start(scope: Scope, receive: Receive, send: Send) -> None:
    await send(START)


@pytest.mark.parametrize("app", [silent, only_start])
def test_a_replica_lost_before_its_answer_is_a_503_that_says_when_to_come_back(app: ASGIApp) -> None:
    with serving(ServeProxyMiddleware(app)) as url:
        response = httpx.post(url, json=chat_body(), headers={"X-Request-Id": "mine"})
    assert response.status_code == 503 and int(response.headers["Retry-After"]) > 0
    assert is_lost(response.json()["error"])
    assert response.headers.get_list("X-Request-Id") == ["mine"]


async def cut(scope: Scope, receive: Receive, send: Send) -> None:
    await send(START)
    await send({"type": "http.response.body", "body": b'data: {"n": 1}\n\n', "more_body": True})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_stream_whose_replica_is_lost_ends_with_an_error_event(path: str) -> None:
    with serving(ServeProxyMiddleware(cut)) as url:
        lines = httpx.post(url + path, json=chat_body()).text.splitlines()
    assert lines[0] == 'data: {"n": 1}' and "data: [DONE]" not in lines
    last = json.loads(lines[-2].removeprefix("data: "))
    assert is_lost(last["error"])
    assert ("event: error" in lines) == (last.get("type") == "error") == path.endswith("messages")


async def plain_json_cut(scope: Scope, receive: Receive, send: Send) -> None:
    await send({**START, "headers": [(b"content-type", b"application/json"), (b"content-length", b"100")]})
    await send({"type": "http.response.body", "body": b'{"half": ', "more_body": True})


def test_an_answer_cut_in_its_middle_cannot_be_taken_for_a_whole_one() -> None:
    with serving(ServeProxyMiddleware(plain_json_cut)) as url, pytest.raises(httpx.RemoteProtocolError):
        httpx.post(url, json=chat_body())


@pytest.mark.parametrize(("status", "later"), [(503, b"7"), (503, None), (408, None)])
def test_serves_plain_errors_become_json(status: int, later: bytes | None) -> None:
    async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"4")]
        headers += [(b"retry-after", later)] if later else []
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"full"})

    with serving(ServeProxyMiddleware(refusing)) as url:
        response = httpx.post(url, json=chat_body())
    assert response.status_code == status
    assert response.json()["error"]["message"] == "full" and response.json()["error"]["code"] == status
    assert response.headers.get("Retry-After") == (later.decode() if later else {503: "2"}.get(status))


def replica(status: int, dead: bool) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = JSONResponse({"error": {"message": "inside"}}, status, headers={"X-Request-Id": "app's"})
        await response(scope, receive, send)

    return ReplicaFront(app, dead=lambda: dead)


@pytest.mark.parametrize(("status", "dead"), [(200, False), (500, False), (400, True), (200, True)])
def test_a_replicas_answer_passes_without_its_request_id(status: int, dead: bool) -> None:
    with serving(replica(status, dead)) as url:
        response = httpx.get(url)
    assert response.status_code == status and response.json()["error"]["message"] == "inside"
    assert "x-request-id" not in response.headers


def test_what_a_dead_engine_left_is_a_503() -> None:
    with serving(replica(500, True)) as url:
        response = httpx.get(url)
    assert response.status_code == 503 and "Retry-After" in response.headers
    assert is_lost(response.json()["error"])
