# SPDX-License-Identifier: Apache-2.0
"""A server without an engine that serves the real page; API key, prune layer and failures on request."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from vtprune_server.playground import attach_playground

TOKENS = 16  # a grid of 4 x 4


@dataclass
class StandIn:
    """Answers the page's requests in the shape of the contract.

    Attributes:
        api_key: what requests must carry; None asks for nothing.
        policy: `policy` of `/vtprune/config`.
        prune_layer: its `model.prune_layer`.
        demo: its `model.demo`.
        model: more of its `model`.
        counts: more of an answer's `usage.vtprune`.
        explain_seconds: how long `/vtprune/explain` takes.
        word_seconds: how long a stream takes from its first word to its second.
        break_stream: whether a stream ends in an error after its first word.
        tiles: how many parts of the picture beside the whole have a curve of their own.
        explained: the settings of each `/vtprune/explain` request.
        questions: its question.
        at_once: the most explain requests that were open at one time.
    """

    api_key: str | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    prune_layer: int | None = None
    demo: bool = False
    model: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    explain_seconds: float = 0.0
    word_seconds: float = 0.0
    break_stream: bool = False
    tiles: int = 0
    explained: list[dict[str, Any]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    at_once: int = 0
    url: str = ""
    _open: int = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve on a free port until the block ends."""
        server = uvicorn.Server(uvicorn.Config(self._app(), port=0, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        yield
        server.should_exit = True
        thread.join(10)

    def _app(self) -> FastAPI:
        app = FastAPI()
        attach_playground(app)

        @app.middleware("http")
        async def check_key(request: Request, call_next: Any) -> Any:
            given = request.headers.get("authorization")
            if self.api_key and request.url.path.startswith("/v1") and given != f"Bearer {self.api_key}":
                return JSONResponse({"error": "Unauthorized"}, 401)
            return await call_next(request)

        app.get("/v1/models")(lambda: {"data": [{"id": "stand-in"}]})
        app.get("/vtprune/config")(self._config)
        app.post("/vtprune/explain")(self._explain)
        app.post("/v1/chat/completions")(self._chat)
        return app

    def _config(self) -> dict[str, Any]:
        return {
            "policy": {"default_preset": "off", **self.policy},
            "model": {"prune_layer": self.prune_layer, "demo": self.demo, **self.model},
            "presets": {
                "off": {"aggressiveness": 0.0, "kv_keep": 1.0},
                "balanced": {"aggressiveness": 0.5, "kv_keep": 0.5},
            },
            "methods": ["inflection", "merging", "own_count", "random"],
            "reads_question": ["random"],
            "versions": {},
        }

    async def _explain(self, request: Request) -> dict[str, Any]:
        body = await request.json()
        settings = body["vtprune"]
        self.explained.append(settings)
        self.questions.append(body["question"])
        self._open += 1
        self.at_once = max(self.at_once, self._open)
        await asyncio.sleep(self.explain_seconds)
        self._open -= 1
        of_preset = self._config()["presets"][settings.get("preset", "off")]["aggressiveness"]
        aggressiveness, method = (
            settings.get("aggressiveness", of_preset),
            settings.get("method", "inflection"),
        )
        kept = kept_at(aggressiveness)
        # `random` keeps the last ranks, `merging` one patch less and a summary token in its place
        stay = {"random": range(TOKENS - kept, TOKENS), "merging": range(kept - 1)}.get(method, range(kept))
        return {
            "grid": [4, 4],
            "crop": {"left": 0.0, "top": 0.0, "width": 1.0, "height": 1.0},
            "image_size": [336, 336],
            "score": "cosine",
            "scores": [1 - i / TOKENS for i in range(TOKENS)],
            "order": list(range(TOKENS)),
            "curve": [(1 - i / (TOKENS - 1)) ** 3 for i in range(TOKENS)],
            "cut": None if method == "own_count" or not aggressiveness else kept,
            "more_views": [_tile(number) for number in range(self.tiles)],
            "kept": [i in stay for i in range(TOKENS)],
            "merged": method == "merging",
            "summary_tokens": int(method == "merging"),
            "vision_tokens": TOKENS,
            "vision_tokens_kept": kept,
            "settings": {"aggressiveness": aggressiveness, "method": method, "keep_ratio": None},
        }

    def _chat(self, request: Request) -> StreamingResponse:
        kept = TOKENS if request.headers.get("x-vtprune-preset") == "off" else 4

        async def events() -> AsyncIterator[str]:
            yield _event({"choices": [{"delta": {"content": " one"}}]})
            if self.break_stream:
                yield _event({"error": {"message": "The engine is on strike.", "param": None, "code": 500}})
                return
            await asyncio.sleep(self.word_seconds)
            yield _event({"choices": [{"delta": {"content": " two"}}]})
            vision = {"vision_tokens": TOKENS, "vision_tokens_kept": kept}
            counts = {**vision, "kv_tokens": 20, "kv_tokens_kept": 10, **self.counts}
            yield _event({"choices": [], "usage": {"prompt_tokens": 20, "vtprune": counts}})
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def _tile(number: int) -> dict[str, Any]:
    """Of two tiles side by side, 1x4 patches each, of which the first `number + 1` stay."""
    return {
        "grid": [1, 4],
        "crop": {"left": number / 2, "top": 0.0, "width": 0.5, "height": 1.0},
        "scores": [0.9, 0.5, 0.2, 0.1],
        "order": [0, 1, 2, 3],
        "curve": [1.0, 0.5, 0.1, 0.0],
        "cut": number + 1,
        "kept": [i <= number for i in range(4)],
        "merged": False,
        "summary_tokens": 0,
    }


def kept_at(aggressiveness: float) -> int:
    """The count the stand-in answers with: it names the aggressiveness it was asked with."""
    return max(1, round(TOKENS * (1 - aggressiveness)))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
