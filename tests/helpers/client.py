# SPDX-License-Identifier: Apache-2.0
"""Requests the server tests send, and what they read from the answers."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from typing import Any

import httpx
from PIL import Image

from tests.conftest import MODEL_NAME
from tests.helpers.pictures import data_url

QUESTION = "what color is the circle ?"
CHAT = "/v1/chat/completions"


def chat_body(*images: Image.Image | str, question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """A greedy chat completion of 4 tokens about some pictures, given as images or URLs."""
    urls = [image if isinstance(image, str) else data_url(image) for image in images]
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": question})
    return {
        "model": MODEL_NAME,
        "max_tokens": 4,
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
        **fields,
    }


def messages_body(image: Image.Image, question: str = QUESTION, max_tokens: int = 4) -> dict[str, Any]:
    """The same as a request of the messages API, which takes a picture's base64 by itself; names no model."""
    source = {"type": "base64", "media_type": "image/png", "data": data_url(image).split(",")[1]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": question}]
    return {"max_tokens": max_tokens, "messages": [{"role": "user", "content": content}]}


def post(
    server: str,
    body: Any,
    headers: Any = None,
    path: str = CHAT,
    timeout: float = 120,
    client: httpx.Client | None = None,
) -> httpx.Response:
    """POST a JSON body; by a client's own connection, always to the same API process of several."""
    with nullcontext(client) if client else httpx.Client() as sender:
        return sender.post(server + path, json=body, headers=headers, timeout=timeout)


def metric(server: str, name: str, label: str = "") -> float:
    """The sum of a metric's samples, of those alone whose labels contain `label`."""
    text = httpx.get(f"{server}/metrics", timeout=30).text
    samples = re.findall(rf"^{name}(\{{.*\}})? (\S+)$", text, re.M)
    return sum(float(value) for labels, value in samples if label in labels)


def told(response: httpx.Response) -> Any:
    """What of an answer must not change from one time to the next."""
    body = response.json()
    return response.status_code, body["choices"][0]["message"]["content"], body["usage"]


N = 144


#: Tokens of the prompt that are not the picture's.
TEXT = 9


def counts(response: httpx.Response) -> dict[str, int]:
    """`usage.vtprune`, checked against the headers."""
    assert response.status_code == 200, response.text
    usage: dict[str, int] = response.json()["usage"]["vtprune"]
    names = {
        "vision_tokens": "X-VTPrune-Vision-Tokens",
        "vision_tokens_kept": "X-VTPrune-Vision-Tokens-Kept",
        "kv_tokens": "X-VTPrune-KV-Tokens",
        "kv_tokens_kept": "X-VTPrune-KV-Tokens-Kept",
    }
    assert {key: int(response.headers[header]) for key, header in names.items()} == usage
    return usage


def answer(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def streamed(stream: httpx.Response) -> tuple[str, dict[str, Any]]:
    """The text of a chat completion's stream, and the usage of its last chunk that has one."""
    text, usage = "", {}
    for line in stream.iter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    return text, usage
