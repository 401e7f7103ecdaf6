# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics, served at /metrics beside vLLM's.

Token counters grow when a response that carries counts is sent, by those counts: over any stretch of time
they equal the sum of the responses' ``usage.vtprune``, and kept + dropped = total. `/tokenize` and
`/v1/messages/count_tokens` generate nothing and are left out. With several API processes vLLM sets up
prometheus_client's multi-process mode, in which the counters of all processes are summed.
"""

from __future__ import annotations

import threading

from prometheus_client import Counter, Gauge, Histogram

from vtprune_server.counts import TokenCounts

REQUESTS = Counter(
    "vtprune_requests",
    "Answered requests, by preset; custom where they asked for no preset's settings.",
    ["preset"],
)
VISION_TOKENS = Counter("vtprune_vision_tokens", "Vision tokens before pruning.")
VISION_TOKENS_KEPT = Counter("vtprune_vision_tokens_kept", "Vision tokens given to the language model.")
VISION_TOKENS_DROPPED = Counter("vtprune_vision_tokens_dropped", "Vision tokens pruned.")
KEPT_RATIO = Histogram(
    "vtprune_kept_ratio",
    "Share of a request's vision tokens that were kept, by preset or custom; not without images.",
    ["preset"],
    buckets=(0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 0.99, 1.0),
)
KV_TOKENS = Counter("vtprune_kv_tokens", "Prompt tokens below the first prune layer.")
KV_TOKENS_KEPT = Counter("vtprune_kv_tokens_kept", "Prompt tokens above the first prune layer.")
KV_TOKENS_DROPPED = Counter("vtprune_kv_tokens_dropped", "Prompt tokens dropped at the first prune layer.")
UNPRUNED = Counter(
    "vtprune_requests_unpruned",
    "Answered requests that lost no token: off (they asked for none of it), no_images, nothing_to_drop (the "
    "rule kept every token), or why the second stage could not (too_long, prompt_embeds, ...).",
    ["reason"],
)
REJECTED = Counter("vtprune_rejected_settings", "Requests refused for their pruning settings.", ["field"])
REFUSED = Counter(
    "vtprune_refused", "Requests refused by the server's limits: body_too_large, private_address.", ["reason"]
)
TOWER_SECONDS = Histogram(
    "vtprune_tower_seconds",
    "Seconds per pass of the vision tower.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
TOWER_BATCH = Histogram(
    "vtprune_tower_batch_size", "Images per pass of the vision tower.", buckets=(1, 2, 4, 8, 16, 32, 64)
)
TOWER_WAITING = Gauge(
    "vtprune_tower_waiting_images",
    "Images that wait for the vision tower, before their requests are admitted to the engine.",
    multiprocess_mode="livesum",
)
CACHE_HITS = Counter(
    "vtprune_tower_cache_hits", "Distinct images of a request whose tower output was there or on its way."
)
CACHE_MISSES = Counter("vtprune_tower_cache_misses", "Distinct images of a request that needed the tower.")
CACHE_BYTES = Gauge(
    "vtprune_tower_cache_bytes", "Bytes of cached tower outputs.", multiprocess_mode="livesum"
)
RESENT = Counter(
    "vtprune_images_resent",
    "Requests sent to the engine again, with their images: vLLM's processor cache had lost one.",
)


AUTO_LEVEL = Gauge(
    "vtprune_auto_level",
    "What the preset auto is now: 0 off, 1 light, 2 balanced, 3 aggressive; of several processes the most.",
    multiprocess_mode="livemax",
)
AUTO_PRESSURE = Gauge(
    "vtprune_auto_pressure",
    "The load that auto follows, as a share of its marks; of several processes the most.",
    multiprocess_mode="livemax",
)
AUTO_MOVES = Counter(
    "vtprune_auto_moves", "Steps of the preset auto, up (prune more) or down.", ["direction"]
)
for _direction in ("up", "down"):  # there from the start, so that a rate sees the first step
    AUTO_MOVES.labels(_direction)
AUTO_REQUESTS = Counter(
    "vtprune_auto_requests", "Answered requests under the preset auto, by the preset it was.", ["level"]
)


def count_response(preset: str, level: str | None, counts: TokenCounts) -> None:
    """Count one answered request.

    Args:
        preset: the preset whose settings it had, or ``custom``.
        level: the preset that `auto` was, where it was asked for.
        counts: those its headers and usage carry.
    """
    REQUESTS.labels(preset).inc()
    if level is not None:
        AUTO_REQUESTS.labels(level).inc()
    VISION_TOKENS.inc(counts.vision_tokens)
    VISION_TOKENS_KEPT.inc(counts.vision_tokens_kept)
    VISION_TOKENS_DROPPED.inc(counts.vision_tokens - counts.vision_tokens_kept)
    KV_TOKENS.inc(counts.kv_tokens)
    KV_TOKENS_KEPT.inc(counts.kv_tokens_kept)
    KV_TOKENS_DROPPED.inc(counts.kv_tokens - counts.kv_tokens_kept)
    if counts.vision_tokens:
        KEPT_RATIO.labels(preset).observe(counts.vision_tokens_kept / counts.vision_tokens)


def observe_tower_pass(images: int, seconds: float) -> None:
    """What `vision.service.VisionService` calls after each pass."""
    TOWER_BATCH.observe(images)
    TOWER_SECONDS.observe(seconds)


_waiting_images = 0
_waiting_lock = threading.Lock()


def count_waiting_images(change: int) -> None:
    """What `vision.service.VisionService` calls as images queue up for a pass and leave for one."""
    global _waiting_images
    TOWER_WAITING.inc(change)
    with _waiting_lock:
        _waiting_images += change


def waiting_images() -> int:
    """Images of this process that wait for the tower."""
    return _waiting_images
