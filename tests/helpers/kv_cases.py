# SPDX-License-Identifier: Apache-2.0
"""The requests that stage 2's engine tests ask, shared by the engine's process and the tests."""

from __future__ import annotations

import itertools

from tests.helpers.pictures import noise, scene
from tests.reference import Request

QUESTION = "<s>USER: <image>\nwhat color is the circle ? ASSISTANT:"
TWO = "<s>USER: <image>\n<image> compare</s> the two. ASSISTANT:"
TEXT = "<s>USER: " + "a story that goes on and on. " * 9 + "ASSISTANT:"


def grid() -> list[Request]:
    """Both stages, both scopes, shares from all to the minimum, no, one and two images."""
    cases = [
        Request(QUESTION, (noise(0),), kv_keep=keep, kv_scope=scope)
        for keep, scope in itertools.product((1.0, 0.75, 0.5, 0.25, 0.001), ("all", "vision"))
    ]
    return [
        *cases,
        Request(QUESTION, (scene(),), aggressiveness=0.5, kv_keep=0.4),
        Request(TWO, (noise(1), noise(2)), kv_keep=0.3, max_tokens=40),
        Request(TWO, (noise(1), scene(9)), aggressiveness=0.4, kv_keep=0.6, kv_scope="vision"),
        Request(TWO, (noise(3), scene(9)), keep_ratio=0.25, kv_keep=0.25),
        Request(TEXT, kv_keep=0.4, max_tokens=70),
        Request(TEXT, kv_keep=0.001),
    ]


def corners() -> list[Request]:
    """A few of the grid, for an engine that is slow to start."""
    return [r for r in grid() if r.kv_keep in (1.0, 0.25, 0.001) or len(r.images) == 2]


def crowd() -> list[Request]:
    """Ten requests that together outgrow a small cache."""
    shares = (0.25, 0.5, 1.0, 0.3, 0.75, 0.001, 0.4, 1.0, 0.6, 0.2)
    return [Request(QUESTION, (noise(i),), kv_keep=k, max_tokens=90) for i, k in enumerate(shares)]


def resettable() -> list[Request]:
    """Requests of every kind that run long enough to be interrupted twice."""
    images = [
        Request(QUESTION, (noise(i),), kv_keep=k, max_tokens=40)
        for i, k in enumerate((1.0, 0.75, 0.5, 0.25, 0.25))
    ]
    return [*images, Request(TEXT, kv_keep=0.3, max_tokens=40)]


def unpruned() -> list[Request]:
    """Requests that every engine must answer alike."""
    texts = [Request(TEXT.replace("story", word)) for word in ("story", "tale", "poem")]
    images = [Request(QUESTION, (noise(i),)) for i in range(3)]
    return [*texts, *images, Request(TWO, (noise(0), noise(1)))]
