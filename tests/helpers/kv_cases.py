# SPDX-License-Identifier: Apache-2.0
"""The requests that stage 2's engine tests ask, shared by the engine's process and the tests."""

from __future__ import annotations

import itertools
from dataclasses import replace

from tests.helpers.pictures import noise, scene
from tests.reference import Request

QUESTION = "<s>USER: <image>\nwhat color is the circle ? ASSISTANT:"
TWO = "<s>USER: <image>\n<image> compare</s> the two. ASSISTANT:"
TEXT = "<s>USER: " + "a story that goes on and on. " * 9 + "ASSISTANT:"


#: The prune layer at which a scenario's gate decides, where it has one (`tests.helpers.kv_gate`).
GATE_AT = {"bands": 3, "bands_preemption": 2, "bands_compiled": 3, "tensor_parallel": 2}
#: Prune layers and ratings of the scenarios with several.
BANDS: dict[str, dict[str, str]] = {
    "bands": {"prune_layers": "2,3:0.6,5:0.3", "relevance": "attention,inherited,no_rope"},
    "bands_preemption": {"prune_layers": "2:0.8,4:0", "relevance": "last_token"},
    "bands_compiled": {
        "prune_layers": "2:vision=0.6,3:vision=0.4,4:vision=0.2,5:0",
        "relevance": "pagerank,inherited,key_norm",
    },
}
#: Those of the conversations whose later turns go on from the first, and tokens of a block there.
TURNS: dict[str, str] = {"prune_layers": "2:0.8,4:0.7", "relevance": "attention,last_token"}
TURNS_BLOCK = 32


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


def band_cases() -> list[Request]:
    """Shares a prune layer, one for all, none at some, the schedule's own, and the exit."""
    shares: list[tuple[float | tuple[float, ...], str]] = [
        (1.0, "all"),
        (0.999, "all"),
        ((1.0, 0.25), "all"),
        ((0.5, 0.25), "all"),
        ((0.5, 0.5, 0.1), "all"),
        ((0.75, 0.4), "vision"),
        ((0.25, 0.001), "all"),
        ((0.5, 1.0, 0.2), "all"),
        ((0.6, 0.0), "all"),
        (0.0, "all"),
    ]
    cases = [Request(QUESTION, (noise(i),), kv_keep=keep, kv_scope=s) for i, (keep, s) in enumerate(shares)]
    return [
        *cases,
        Request(QUESTION, (scene(),), aggressiveness=0.5, kv_keep=(0.6, 0.3)),
        Request(TWO, (noise(1), noise(2)), kv_keep=(0.5, 0.2), max_tokens=40),
        Request(TWO, (noise(1), scene(9)), keep_ratio=0.25, kv_keep=(0.7, 0.35), kv_scope="vision"),
        Request(TEXT, kv_keep=(0.6, 0.2), max_tokens=70),
        Request(TEXT, kv_keep=0.0),
    ]


def ungated(requests: list[Request]) -> list[Request]:
    """The same, refusing the gate."""
    return [replace(request, kv_gate=False) for request in requests]


def gate_cases() -> list[Request]:
    """Shares of every kind below and above the gate, and requests on which it does not decide."""
    shares: list[tuple[float | tuple[float, ...], str]] = [
        (0.999, "all"),
        ((0.7, 0.5), "all"),
        ((0.999, 0.999, 0.3), "vision"),
        ((0.5, 0.5, 0.2), "all"),
        (0.999, "all"),
        ((0.6, 0.999), "all"),
        (0.8, "vision"),
        ((0.999, 0.4), "all"),
    ]
    # longer than the text's last block, so that blocks are taken again after some were returned
    cases = [
        Request(QUESTION, (noise(20 + i),), kv_keep=keep, kv_scope=s, max_tokens=16 if i % 2 else 30)
        for i, (keep, s) in enumerate(shares)
    ]
    return [
        *cases,
        Request(TWO, (noise(1), noise(2)), kv_keep=0.9, max_tokens=40),
        # whole, by a share of 1 where the gate stands, by refusal, without a picture; gone below it anyhow
        Request(QUESTION, (noise(20),)),
        Request(QUESTION, (noise(20),), kv_keep=(0.6, 1.0, 0.5)),
        Request(QUESTION, (noise(21),), kv_keep=0.5, kv_gate=False),
        Request(TEXT, kv_keep=0.5),
        Request(QUESTION, (noise(22),), kv_keep=0.0),
    ]


def gate_crowd(max_tokens: int = 90) -> list[Request]:
    """A crowd of which the gate decides on most."""
    return [
        replace(r, images=(noise(40 + i),), kv_keep=0.999 if i % 2 else r.kv_keep)
        for i, r in enumerate(band_crowd(max_tokens))
    ]


def band_crowd(max_tokens: int = 90) -> list[Request]:
    """Ten requests that together outgrow a small cache, each with a share for two prune layers."""
    return [
        replace(r, kv_keep=(r.kv_keep, r.kv_keep / 2 if i % 2 else 0.0))
        for i, r in enumerate(crowd(max_tokens))
    ]


def alone() -> list[Request]:
    """A few of the corners, to be asked one at a time."""
    return corners()[::3]


def crowd(max_tokens: int = 90) -> list[Request]:
    """Ten requests that together outgrow a small cache."""
    shares = (0.25, 0.5, 1.0, 0.3, 0.75, 0.001, 0.4, 1.0, 0.6, 0.2)
    return [Request(QUESTION, (noise(i),), kv_keep=k, max_tokens=max_tokens) for i, k in enumerate(shares)]


def brief_crowd() -> list[Request]:
    """The same for a cache of 150 blocks of 32."""
    return crowd(max_tokens=75)


def resettable() -> list[Request]:
    """Requests of every kind that run long enough to be interrupted twice."""
    images = [
        Request(QUESTION, (noise(i),), kv_keep=k, max_tokens=28)
        for i, k in enumerate((1.0, 0.75, 0.5, 0.25, 0.25))
    ]
    return [*images, Request(TEXT, kv_keep=0.3, max_tokens=28)]


def replayed() -> list[Request]:
    """Some of the grid and a crowd, for decode batches of every size."""
    return [*grid()[6:8], *grid()[10:14], *brief_crowd()]


def texts() -> list[Request]:
    """Requests without a picture."""
    return [Request(TEXT, kv_keep=keep, max_tokens=12) for keep in (1.0, 0.4, 0.001)]


def unpruned() -> list[Request]:
    """Requests that every engine must answer alike."""
    texts = [Request(TEXT.replace("story", word)) for word in ("story", "tale", "poem")]
    images = [Request(QUESTION, (noise(i),)) for i in range(3)]
    return [*texts, *images, Request(TWO, (noise(0), noise(1)))]


def talks() -> list[Request]:
    """The first turns: drops at both prune layers, at one of them, of text, of visual tokens; and none."""
    return [
        Request(QUESTION, (noise(60),), kv_keep=0.5, max_tokens=24),
        Request(QUESTION, (noise(61),), kv_keep=(0.75, 0.3), kv_scope="vision", max_tokens=24),
        Request(QUESTION, (noise(62),), kv_keep=(1.0, 0.4), max_tokens=24),
        Request(QUESTION, (noise(63),), kv_keep=(0.6, 1.0), max_tokens=24),
        Request(QUESTION, (scene(),), aggressiveness=0.3, kv_keep=0.3, max_tokens=24),
        Request(TWO, (noise(64), noise(65)), kv_keep=(0.5, 0.2), max_tokens=24),
        Request(TEXT, kv_keep=0.4, max_tokens=24),
        Request(QUESTION, (noise(66),), max_tokens=24),
    ]
