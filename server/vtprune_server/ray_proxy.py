# SPDX-License-Identifier: Apache-2.0
"""Inside Ray Serve's HTTP proxies: affinity of pictures to replicas, one request id, errors as JSON.

Loaded by ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=vtprune_server.ray_proxy.middlewares`` on every node.
Without it requests are answered all the same: pictures without a session id go to any replica, and Serve's
own errors are plain text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vtprune_server.ray_front import LOST, error_document, send_error

#: A body announced to be larger than this, or growing beyond it, is passed on without a look at it.
_MOST_BYTES = 64 << 20
#: A picture in a JSON body, as the routes name it: a URL, or base64 by itself (the messages API).
_PICTURE = re.compile(rb'"(?:url|image_url|data)"\s*:\s*"(?:data:[^",]*,)?([^"]+)"')
#: As long as `vtprune_server.middleware.request_ids` takes one.
_LONGEST_ID = 128


def middlewares() -> list[Middleware]:
    """What Serve's proxies ask for."""
    return [Middleware(ServeProxyMiddleware)]


def picture_key(body: bytes) -> str | None:
    """The digest of the first picture in a JSON body, or None without one.

    A search of the text, not a parse: a key that is wrong costs a cached picture, never an answer.
    """
    found = _PICTURE.search(body)
    return hashlib.sha256(found[1]).hexdigest() if found else None


class ServeProxyMiddleware:
    """Outermost in the proxy.

    - A POST without a session id gets its first picture's digest as one; `ConsistentHashRouter` routes by it.
    - A request without a usable `X-Request-Id` gets one here, so that Serve and the replica use the same.
    - Where a replica is lost before it has answered, Serve answers nothing and uvicorn a plain 500; here the
      client gets a 503 with Retry-After. A stream that was cut ends with an error event.

    Args:
        app: Serve's proxy (`ray.serve._private.proxy.HTTPProxy`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        name = os.environ.get("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id")
        self.session_header = name.lower().encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = headers.get(b"x-request-id", b"")
        if not request_id or len(request_id) > _LONGEST_ID:
            request_id = uuid.uuid4().hex.encode()
            kept = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
            scope["headers"] = [*kept, (b"x-request-id", request_id)]
        length = headers.get(b"content-length", b"0")
        small = length.isdigit() and int(length) <= _MOST_BYTES
        if scope["method"] == "POST" and self.session_header not in headers and small:
            receive = await self._keyed(scope, receive)
        answer = _Answer(scope["path"], request_id, send)

        async def noted() -> Message:
            message = await receive()
            answer.client_left = answer.client_left or message["type"] == "http.disconnect"
            return message

        await self.app(scope, noted, answer.send)
        await answer.finish()

    async def _keyed(self, scope: Scope, receive: Receive) -> Receive:
        """Read the body, add the session id, and give a `receive` that hands the body on."""
        messages: list[Message] = []
        size, more = 0, True
        while more and size <= _MOST_BYTES:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        key = picture_key(b"".join(message.get("body", b"") for message in messages))
        if key is not None:
            scope["headers"] = [*scope["headers"], (self.session_header, key.encode())]
        messages.reverse()

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return again


class _Answer:
    """Passes an answer on, its start held back until there is more; completes what a lost replica left."""

    def __init__(self, path: str, request_id: bytes, send: Send) -> None:
        self.path = path
        self.request_id = request_id
        self.client_left = False
        self._send = send
        self._start: Message | None = None
        self._plain_error = b""
        self._begun = self._ended = False
        self._tail = b"\n\n"

    async def send(self, message: Message) -> None:
        """What the proxy calls as ASGI's `send`."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        self._ended = not message.get("more_body", False)
        if not self._begun and self._is_plain_error():
            self._plain_error += message.get("body", b"")
            if self._ended:
                await self._send_plain_error()
            return
        await self._begin()
        self._tail = (self._tail + message.get("body", b""))[-2:]
        await self._send(message)

    async def finish(self) -> None:
        """Called when the proxy has nothing more to say."""
        if self._ended or self.client_left:
            return
        if not self._begun:
            await send_error(self._send, LOST, 503, self._kept_headers())
        elif self._header(b"content-type").startswith(b"text/event-stream"):
            event = error_document(LOST, 503)
            name = b""
            if self.path.endswith("/messages"):  # the messages API names its events, and nests its errors
                event, name = {"type": "error", **event}, b"event: error\n"
            text = b"data: " + json.dumps(event).encode() + b"\n\n"
            apart = b"" if self._tail == b"\n\n" else b"\n\n"
            await self._send({"type": "http.response.body", "body": apart + name + text})

    async def _begin(self) -> None:
        if not self._begun and self._start is not None:
            self._begun = True
            await self._send(self._start)

    def _header(self, name: bytes) -> bytes:
        headers = self._start["headers"] if self._start else []
        return next((bytes(value) for key, value in headers if key.lower() == name), b"")

    def _kept_headers(self) -> list[tuple[bytes, bytes]]:
        """Of Serve's own answer, what belongs on ours too."""
        later = self._header(b"retry-after")
        return [(b"x-request-id", self.request_id), *([(b"retry-after", later)] if later else [])]

    def _is_plain_error(self) -> bool:
        plain = self._header(b"content-type").startswith(b"text/plain")
        return self._start is not None and self._start["status"] >= 400 and plain

    async def _send_plain_error(self) -> None:
        assert self._start is not None
        self._begun = True
        status = self._start["status"]
        text = self._plain_error.decode(errors="replace")
        await send_error(self._send, text, status, self._kept_headers())
