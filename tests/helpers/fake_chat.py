# SPDX-License-Identifier: Apache-2.0
"""A small OpenAI-compatible chat server over real HTTP that behaves exactly as told."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

PROMPT_TOKENS = 20
VISION_TOKENS = 100
KEPT = {"off": 100, "light": 50, "balanced": 22, "aggressive": 5, "auto": 22}
Failure = int | str | None


class FakeChat:
    """Answers with one chunk per requested token; what it does may be changed between runs.

    Attributes:
        prunes: it is a vtprune server, with its usage, headers and `/vtprune/config`.
        usage: there is a usage chunk.
        hides_config: `/vtprune/config` is a 404, as behind a proxy.
        answers_everything: `/vtprune/config` is a page of its own, as on a server with one for every path.
        counts_caches: it keeps the pictures it has met, and counts them as vLLM does.
        owner: `owned_by` of the model; a server of vLLM says "vllm".
        prefill_s, token_s: seconds before the first token and between tokens.
        prefill_of: by preset, instead of `prefill_s`.
        one_chunk: all of an answer's text comes at its end, as where no token alone is valid text.
        says: from a question's text to the whole answer, which ends there; None for one chunk per token.
        tokens_per_image: what `/vtprune/config` says: None where it depends on the picture.
        fail: from a chat request's number to how it fails: an HTTP status, "cut" (the connection breaks after
            the first token), "event" (an error event), or None.
        bodies, headers: of every chat request, in order of arrival.
    """

    def __init__(self) -> None:
        self.url = ""
        self.registry = CollectorRegistry()
        self.tokens = Counter("vllm:generation_tokens", "Tokens.", registry=self.registry)
        self.cache_queries = Counter("vllm:mm_cache_queries", "Pictures.", registry=self.registry)
        self.cache_hits = Counter("vllm:mm_cache_hits", "Pictures met before.", registry=self.registry)
        Gauge("load", "Not a counter.", registry=self.registry).set(7)
        self.reset()

    def reset(self) -> None:
        """Forget the requests and behave well again."""
        self.prunes = self.usage = True
        self.hides_config = self.answers_everything = self.counts_caches = False
        self.pictures: set[str] = set()
        self.owner = "vllm"
        self.prefill_s = self.token_s = 0.0
        self.prefill_of: dict[str, float] = {}
        self.one_chunk = False
        self.says: Callable[[str], str] | None = None
        self.tokens_per_image: int | None = None
        self.fail: Callable[[int], Failure] = lambda number: None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.peak = 0

    async def chat(self, request: Request) -> Response:
        failure = self.fail(len(self.bodies))
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        preset = request.headers.get("x-vtprune-preset", "off")
        if preset not in KEPT:
            failure = 400
        if isinstance(failure, int):
            return JSONResponse({"error": {"message": f"refused with {failure}"}}, failure)
        if self.counts_caches:
            self._count_pictures(body)
        headers = {"X-VTPrune-Vision-Tokens-Kept": str(KEPT[preset])} if self.prunes else {}
        if preset == "auto":
            headers["X-VTPrune-Level"] = ("off", "balanced")[len(self.bodies) % 2]
        if not body.get("stream"):
            counts = {"vision_tokens": VISION_TOKENS, "vision_tokens_kept": KEPT[preset]}
            usage = {"usage": {"vtprune": counts}} if self.prunes else {}
            return JSONResponse({"choices": [{"message": {"content": "a"}}], **usage}, headers=headers)
        events = self._stream(body, preset, failure)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    def _count_pictures(self, body: dict[str, Any]) -> None:
        for part in body["messages"][0]["content"]:
            if part["type"] == "image_url":
                url = part["image_url"]["url"]
                self.cache_queries.inc()
                self.cache_hits.inc(url in self.pictures)
                self.pictures.add(url)

    async def _stream(self, body: dict[str, Any], preset: str, failure: str | None) -> AsyncIterator[bytes]:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            # The role comes before the prompt is computed, as on some servers: it is no token.
            yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            await asyncio.sleep(self.prefill_of.get(preset, self.prefill_s))
            said = ["a "] * (1 if self.one_chunk else body["max_tokens"])
            ends = "length"
            if self.says is not None:
                said, ends = list(self.says(body["messages"][0]["content"][-1]["text"])), "stop"
            for token, text in enumerate(said):
                if token:
                    await asyncio.sleep(self.token_s)
                last = token == len(said) - 1
                choice = {"index": 0, "delta": {"content": text}, "finish_reason": ends if last else None}
                self.tokens.inc()
                yield _event({"choices": [choice]})
                if failure == "cut":
                    raise ConnectionResetError
                if failure == "event":
                    yield _event({"error": {"message": "the engine is gone"}})
                    return
            if self.usage:
                usage: dict[str, Any] = {
                    "prompt_tokens": PROMPT_TOKENS,
                    "completion_tokens": body["max_tokens"],
                }
                if self.prunes:
                    usage["vtprune"] = {"vision_tokens": VISION_TOKENS, "vision_tokens_kept": KEPT[preset]}
                yield _event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        finally:
            self.in_flight -= 1


@contextmanager
def serve_fake_chat() -> Iterator[FakeChat]:
    """A running server on a free port, in a thread of this process."""
    fake = FakeChat()
    config = uvicorn.Config(_app(fake), host="127.0.0.1", port=0, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join()


def _app(fake: FakeChat) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": "fake-vlm", "owned_by": fake.owner}]}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(generate_latest(fake.registry))

    @app.get("/vtprune/config")
    async def config() -> Response:
        if fake.answers_everything:
            return JSONResponse({"message": "welcome"})
        if not fake.prunes or fake.hides_config:
            return JSONResponse({"detail": "Not Found"}, 404)
        model = {"id": "fake", "vision_tokens_per_image": fake.tokens_per_image}
        return JSONResponse({"policy": {}, "model": model, "versions": {"vtprune": "0", "vllm": "0"}})

    app.post("/v1/chat/completions", response_model=None)(fake.chat)
    return app


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"
