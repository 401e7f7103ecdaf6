# SPDX-License-Identifier: Apache-2.0
"""`vtprune_*` at /metrics: what they count is what the responses said."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from tests.helpers.client import CHAT, chat_body, metric, post
from tests.helpers.pictures import noise, scene

pytestmark = pytest.mark.engine

FIELDS = ("vision_tokens", "vision_tokens_kept", "kv_tokens", "kv_tokens_kept")


def totals(server: str) -> dict[str, float]:
    names = (*FIELDS, "vision_tokens_dropped", "kv_tokens_dropped", "requests", "requests_unpruned")
    return {name: metric(server, f"vtprune_{name}_total") for name in names}


def usage_of_stream(server: str) -> dict[str, int]:
    body = chat_body(
        scene(), stream=True, stream_options={"include_usage": True}, vtprune={"keep_ratio": 0.5}
    )
    with httpx.stream("POST", server + CHAT, json=body, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    usage: dict[str, int] = json.loads(lines[-1].removeprefix("data: "))["usage"]["vtprune"]
    return usage


def test_counters_equal_the_sum_over_responses(server: str) -> None:
    before = totals(server)
    requests = [
        chat_body(scene()),
        chat_body(scene(5), scene(9), vtprune={"preset": "balanced"}),
        chat_body(scene(), vtprune={"keep_ratio": 0.1}),
        chat_body(question="what"),
    ]
    usages = [post(server, body).json()["usage"]["vtprune"] for body in requests]
    usages.append(usage_of_stream(server))
    # none of these answers with counts, so none may be counted
    assert post(server, chat_body(scene(), vtprune={"aggressiveness": 7})).status_code == 400
    assert post(server, chat_body(scene(), max_tokens=10**6)).status_code == 400
    assert post(server, {"messages": requests[0]["messages"]}, path="/tokenize").status_code == 200
    after = totals(server)
    grown = {name: after[name] - before[name] for name in after}
    for field in FIELDS:
        assert grown[field] == sum(usage[field] for usage in usages), field
    assert grown["vision_tokens"] == grown["vision_tokens_kept"] + grown["vision_tokens_dropped"]
    assert grown["kv_tokens"] == grown["kv_tokens_kept"] + grown["kv_tokens_dropped"]
    assert grown["requests"] == len(usages)
    whole = sum(u["vision_tokens"] == u["vision_tokens_kept"] and u["kv_tokens"] == u["kv_tokens_kept"]
                for u in usages)  # fmt: skip
    assert grown["requests_unpruned"] == whole


def test_kept_ratio_by_preset(server: str) -> None:
    def of(preset: str) -> tuple[float, float]:
        label = f'preset="{preset}"'
        return (
            metric(server, "vtprune_kept_ratio_sum", label),
            metric(server, "vtprune_kept_ratio_count", label),
        )

    before = of("aggressive")
    usage = post(server, chat_body(scene(), vtprune={"preset": "aggressive"})).json()["usage"]["vtprune"]
    after = of("aggressive")
    assert after[1] - before[1] == 1
    assert after[0] - before[0] == pytest.approx(usage["vision_tokens_kept"] / usage["vision_tokens"])


def test_what_is_no_presets_is_counted_as_custom(server: str) -> None:
    names = ("requests_total", "kept_ratio_sum", "kept_ratio_count")

    def read(preset: str) -> list[float]:
        return [metric(server, f"vtprune_{name}", f'preset="{preset}"') for name in names]

    before = {preset: read(preset) for preset in ("off", "custom")}
    assert post(server, chat_body(scene()), {"X-VTPrune-Keep-Ratio": "0.25"}).status_code == 200
    assert read("off") == before["off"]
    assert [b - a for a, b in zip(before["custom"], read("custom"), strict=True)] == pytest.approx(
        [1, 0.25, 1]
    )


@pytest.mark.parametrize(
    "body,headers,reason",
    [
        (chat_body(scene()), {}, "off"),
        (chat_body(question="what"), {"X-VTPrune-Aggressiveness": "0.5"}, "no_images"),
        (chat_body(scene()), {"X-VTPrune-Aggressiveness": "0.001"}, "nothing_to_drop"),
    ],
)
def test_unpruned_requests_by_reason(server: str, body: object, headers: dict[str, str], reason: str) -> None:
    headers = {"X-VTPrune-Preset": "off", **headers}
    before = metric(server, "vtprune_requests_unpruned_total", f'"{reason}"')
    assert post(server, body, headers).status_code == 200
    assert metric(server, "vtprune_requests_unpruned_total", f'"{reason}"') == before + 1


@pytest.mark.parametrize(
    "headers,field",
    [
        ({"X-VTPrune-Aggressiveness": "7"}, "aggressiveness"),
        ({"x-vtprune-kv-keep": "2"}, "kv_keep"),
        ({"X-VTPrune-Nonsense": "1"}, "unknown"),
    ],
)
def test_rejected_settings_by_field(server: str, headers: dict[str, str], field: str) -> None:
    before = metric(server, "vtprune_rejected_settings_total", f'"{field}"')
    assert post(server, chat_body(scene()), headers).status_code == 400
    assert metric(server, "vtprune_rejected_settings_total", f'"{field}"') == before + 1
    assert "onsense" not in httpx.get(f"{server}/metrics").text


def test_tower_passes_and_cache_hits(server: str) -> None:
    names = (
        "tower_batch_size_sum",
        "tower_seconds_count",
        "tower_cache_hits_total",
        "tower_cache_misses_total",
    )

    def read() -> list[float]:
        return [metric(server, f"vtprune_{name}") for name in names]

    first = read()
    for aggressiveness in (0.3, 0.5):
        post(server, chat_body(noise(987), vtprune={"aggressiveness": aggressiveness}))
    assert [b - a for a, b in zip(first, read(), strict=True)] == [1, 1, 1, 1]
    assert metric(server, "vtprune_tower_cache_bytes") > 0


def test_images_that_wait_for_the_tower_are_shown_and_none_is_left_over(server: str) -> None:
    """Some of the clients hang up before they are answered."""
    bodies = [chat_body(*(noise(5000 + 10 * i + j) for j in range(8))) for i in range(24)]

    def ask(i: int) -> None:
        with suppress(httpx.TimeoutException):
            post(server, bodies[i], timeout=0.2 if i % 3 == 0 else 120)

    def waiting() -> float:
        return metric(server, "vtprune_tower_waiting_images")

    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(ask, i) for i in range(len(bodies))]
        seen = [waiting()]
        while not all(request.done() for request in asked):
            seen.append(waiting())
        for request in asked:
            request.result()
    assert max(seen) > 0
    deadline = time.monotonic() + 60
    while waiting() != 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert waiting() == 0


def test_auto_follows_the_engines_own_statistics(server: str) -> None:
    """A long answer holds blocks of the KV cache, a part of what the preset auto goes by."""
    body = chat_body(scene(), stream=True, max_tokens=800, min_tokens=800, ignore_eos=True)
    seen = [metric(server, "vtprune_auto_pressure")]
    with httpx.stream("POST", server + CHAT, json=body, timeout=120) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number % 50 == 0:
                seen.append(metric(server, "vtprune_auto_pressure"))
    assert max(seen) > 0
