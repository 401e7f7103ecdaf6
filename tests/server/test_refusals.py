# SPDX-License-Identifier: Apache-2.0
"""Requests refused before a handler runs: vLLM's own application with the plugin in it, and no engine."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.helpers.client import CHAT

SECRET = "zanzibar"
KEY = {"Authorization": "Bearer a-key"}


@pytest.fixture(scope="module")
def app() -> Iterator[Any]:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_vtprune.compat import serve_parser
    from vtprune_server.plugin import add_outer_middleware

    make_arg_parser, _ = serve_parser()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "vtprune")
        patch.setenv("VTPRUNE_MAX_BODY_MB", "1")
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--api-key", "a-key"])
        app = build_app(args, ("generate",))
        # vLLM calls the plugin's `init_state` here, which needs an engine for its other half
        add_outer_middleware(app)
        yield app


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """The request log's lines."""
    found: list[dict[str, Any]] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(record.getMessage()))

    handler, logger = Lines(), logging.getLogger("vtprune.requests")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


async def ask(app: Any, path: str, headers: dict[str, str], content: str = "{}") -> httpx.Response:
    headers = {"Content-Type": "application/json", "X-Request-Id": "an-id", **headers}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post(path, headers=headers, content=content)


REFUSALS: dict[str, tuple[dict[str, str], str, int]] = {
    "no key": ({}, "{}", 401),
    "a bad setting": ({**KEY, "X-VTPrune-Aggressiveness": SECRET}, '{"model": "m", "messages": []}', 400),
    "an unknown header": ({**KEY, f"X-VTPrune-{SECRET}": "1"}, '{"model": "m", "messages": []}', 400),
    "no JSON": (KEY, f"{{{SECRET}", 400),
    "a wrong body": (KEY, f'{{"messages": "{SECRET}"}}', 400),
    "a large body": (KEY, " " * (2**20 + 1), 413),
}


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/messages/count_tokens", "/tokenize"])
@pytest.mark.parametrize("name", REFUSALS)
async def test_each_is_one_line_and_quotes_nothing(
    app: Any, lines: list[dict[str, Any]], path: str, name: str
) -> None:
    headers, body, status = REFUSALS[name]
    response = await ask(app, path, headers, body)
    assert response.status_code == status
    assert response.headers["X-Request-Id"] == "an-id"
    (line,) = lines
    assert (line["event"], line["route"], line["status"]) == ("request", path, status)
    assert line["request_id"] == "an-id" and line["seconds"] >= 0
    assert SECRET not in json.dumps(line)


async def test_a_path_is_the_clients_text(app: Any, lines: list[dict[str, Any]]) -> None:
    assert (await ask(app, f"/{SECRET}", {})).status_code == 401
    (line,) = lines
    assert line["route"] is None and line["status"] == 401


async def test_probes_and_pages_are_not_logged(app: Any, lines: list[dict[str, Any]]) -> None:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        for path in ("/metrics", "/playground", "/openapi.json"):
            assert (await client.get(path, follow_redirects=True)).status_code == 200
    assert lines == []


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_errors_have_anthropics_shape_on_its_routes(app: Any, path: str, name: str) -> None:
    headers, body, _ = REFUSALS[name]
    response = await ask(app, path, headers, body)
    answer = response.json()
    assert set(answer) == {"type", "error"} and answer["type"] == "error"
    assert set(answer["error"]) == {"type", "message"}
    assert answer["error"]["type"] and answer["error"]["message"]
    assert int(response.headers["content-length"]) == len(response.content)
    elsewhere = (await ask(app, CHAT, headers, body)).json()
    assert "type" not in elsewhere and elsewhere["error"]
