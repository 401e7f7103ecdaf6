# SPDX-License-Identifier: Apache-2.0
"""Stands between a benchmark tool and a vtprune server: every request becomes one of an arm.

Tools that send no headers, and none that shrink pictures, can so be run with any setting; and what the server
did to each request is counted where the tool does not look.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from vtprune_loadtest.images import Picture, smaller

_CHAT = "/v1/chat/completions"
_TIMEOUT_S = 600.0
_PASSED_ON = ("content-type",)


@dataclass
class Traffic:
    """What went through, summed over the answered requests.

    Attributes:
        answered: with a 200.
        refused: with anything else, or not at all.
        vision_tokens: before pruning.
        vision_tokens_kept: given to the language model.
        errors: the first few refusals.
    """

    answered: int = 0
    refused: int = 0
    vision_tokens: int = 0
    vision_tokens_kept: int = 0
    errors: list[str] = field(default_factory=list)

    def note(self, response: httpx.Response) -> None:
        """Count one response of the server."""
        if response.status_code != httpx.codes.OK:
            self.refuse(f"{response.status_code}: {response.text[:300]}")
            return
        self.answered += 1
        with contextlib.suppress(ValueError, KeyError, TypeError):
            usage = response.json()["usage"]["vtprune"]
            self.vision_tokens += usage["vision_tokens"]
            self.vision_tokens_kept += usage["vision_tokens_kept"]

    def refuse(self, reason: str) -> None:
        """Count one request that got no answer."""
        self.refused += 1
        if len(self.errors) < 3:
            self.errors.append(reason)


@contextlib.contextmanager
def arm_proxy(
    server: str, headers: Mapping[str, str], pixels: float = 1.0, api_key: str | None = None
) -> Iterator[tuple[str, Traffic]]:
    """Run the proxy on a free port of this machine.

    Args:
        server: the base URL.
        headers: added to every chat request.
        pixels: share of each picture's pixels that is passed on.
        api_key: the server's.

    Yields:
        The proxy's base URL, and what has gone through it so far.
    """
    traffic = Traffic()
    added = {**headers, **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
    client = httpx.AsyncClient(base_url=server.rstrip("/"), timeout=_TIMEOUT_S, trust_env=False)

    async def forward(request: Request) -> Response:
        body = await request.body()
        passed = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        is_chat = request.url.path == _CHAT
        if is_chat and pixels < 1:
            body = _with_smaller_pictures(body, pixels)
        try:
            response = await client.request(
                request.method, request.url.path, content=body, headers={**passed, **added}
            )
        except httpx.HTTPError as error:
            traffic.refuse(repr(error))
            return Response(json.dumps({"error": {"message": repr(error)}}), 502)
        if is_chat:
            traffic.note(response)
        kind = response.headers.get("content-type", "application/json")
        return Response(response.content, response.status_code, media_type=kind)

    app = Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST"])])
    with _served(app) as url:
        yield url, traffic


def _with_smaller_pictures(body: bytes, pixels: float) -> bytes:
    """A chat request with its `data:` pictures shrunk; others, and what is no chat request, stay."""
    try:
        request: Any = json.loads(body)
        messages = request["messages"]
    except (ValueError, KeyError, TypeError):
        return body
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            picture = part.get("image_url") if isinstance(part, dict) else None
            if isinstance(picture, dict) and str(picture.get("url", "")).startswith("data:"):
                picture["url"] = _smaller_url(picture["url"], pixels)
    return json.dumps(request).encode()


def _smaller_url(url: str, pixels: float) -> str:
    head, _, encoded = url.partition(",")
    kind = head.removeprefix("data:").partition(";")[0]
    try:
        shrunk = smaller(Picture(kind, base64.b64decode(encoded)), pixels)
    except (OSError, ValueError, binascii.Error):
        return url  # the server says what is wrong with it
    return f"{head},{base64.b64encode(shrunk.data).decode()}"


@contextlib.contextmanager
def _served(app: Starlette) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(30)
