# SPDX-License-Identifier: Apache-2.0
"""What this API process knows of the load: vLLM's own statistics, and the images that wait for the tower.

Hook: a logger beside those of `vllm.v1.metrics.loggers.StatLoggerManager`, which
`vllm.v1.engine.async_llm.AsyncLLM` calls after every step. With several API processes an engine tells one of
them of each step (`Scheduler.update_from_output`), so each has figures of its own, some steps old, and judges
for itself; so does each replica under Ray.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_vtprune.contract import PRESETS
from vtprune_server import metrics
from vtprune_server.auto import AutoLevel, Load, Marks

if TYPE_CHECKING:
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

    from vllm_vtprune.policy import PrunePolicy

logger = logging.getLogger(__name__)

#: How often the level is judged, in seconds.
TICK_SECONDS = 0.25
#: The last first tokens from which the next one is foretold.
_WINDOW_SECONDS = 5.0
#: What an engine said longer ago than this says nothing of now: another API process hears its news.
_STALE_SECONDS = 10.0


class EngineLoad(AggregateStatLoggerBase):
    """Keeps the newest statistics of each engine.

    Args:
        processes: API processes that share the engines. A process sees the first tokens of its own requests
            and the queue of all.
    """

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes
        self._engines: dict[int, tuple[float, int, float]] = {}
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=4096)
        # of steps before which requests waited: when they ended, how long they took, first tokens in them
        self._busy: deque[tuple[float, float, int]] = deque(maxlen=4096)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """`StatLoggerBase.record`, which vLLM calls after a step."""
        now = time.monotonic()
        ttfts = [] if iteration_stats is None else iteration_stats.time_to_first_tokens_iter
        self._first_tokens.extend((now, ttft) for ttft in ttfts)
        before, waited, _ = self._engines.get(engine_idx, (now, 0, 0.0))
        if waited:
            self._busy.append((now, now - before if scheduler_stats is not None else 0.0, len(ttfts)))
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._engines[engine_idx] = (now, waiting, scheduler_stats.kv_cache_usage)

    def log_engine_initialized(self) -> None:
        """`StatLoggerBase.log_engine_initialized`: nothing to say."""

    def load(self, now: float, images: int) -> Load:
        """The load as it is known.

        A request that comes now waits for those before it, at the pace that the engine has shown in the last
        seconds while others waited, or as long as the slow ones did lately, whichever is more.

        Args:
            now: of `time.monotonic`.
            images: that wait for the tower; their requests stand before the engine's queue.
        """
        known = [(waiting, kv) for at, waiting, kv in self._engines.values() if now - at < _STALE_SECONDS]
        waiting = sum(w for w, _ in known) / len(known) if known else 0.0
        queue = waiting * max(1, len(known)) + images
        return Load(waiting, max((kv for _, kv in known), default=0.0), images, self._expected(now, queue))

    def _expected(self, now: float, queue: float) -> float | None:
        for events in (self._first_tokens, self._busy):
            while events and now - events[0][0] > _WINDOW_SECONDS:
                events.popleft()
        seen = sorted(seconds for _, seconds in self._first_tokens)
        expected = seen[len(seen) * 9 // 10] if seen else None
        tokens = self._processes * sum(count for _, _, count in self._busy)
        if tokens:
            wait = queue * sum(seconds for _, seconds, _ in self._busy) / tokens
            expected = max(wait, expected or 0.0)
        return expected


def auto_level(policy: PrunePolicy) -> AutoLevel:
    """The controller that the operator's settings describe."""
    marks = Marks(policy.auto_waiting, policy.auto_kv_use, policy.auto_images, policy.auto_ttft_ms / 1000)
    return AutoLevel(policy.auto_levels, marks, policy.auto_calm_s)


def listen(engine_client: Any, processes: int) -> EngineLoad:
    """Have vLLM tell its statistics to a new `EngineLoad`.

    Args:
        engine_client: vLLM's.
        processes: API processes that share the engines.
    """
    load = EngineLoad(processes)
    manager = getattr(engine_client, "logger_manager", None)
    if manager is None:
        logger.warning(
            "vtprune: --disable-log-stats keeps the engine's queue from the preset auto, which then follows "
            "the images that wait for the tower alone: leave that flag out."
        )
    else:
        manager.stat_loggers.append(load)
    return load


async def follow(auto: AutoLevel, engine: EngineLoad) -> None:
    """Judge the level again and again, until cancelled."""
    while True:
        now = time.monotonic()
        moved = auto.observe(current_load(engine, now), now)
        metrics.AUTO_LEVEL.set(list(PRESETS).index(auto.level))
        metrics.AUTO_PRESSURE.set(auto.pressure)
        if moved:
            metrics.AUTO_MOVES.labels("up" if moved > 0 else "down").inc()
            logger.info("vtprune: auto is %s now, at %.2f of its marks.", auto.level, auto.pressure)
        await asyncio.sleep(TICK_SECONDS)


def current_load(engine: EngineLoad, now: float) -> Load:
    """The load that `follow` judges by."""
    return engine.load(now, metrics.waiting_images())
