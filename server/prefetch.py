# SPDX-License-Identifier: Apache-2.0
"""Lets concurrent requests share a pass of the vision tower.

vLLM runs its multimodal processor on one thread, request after request (`BaseRenderer._mm_executor`). Here
the tower's work is done beforehand on a few threads, where it is batched (`vision.tower_service`); the
processor then finds its outputs in the cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vllm_vtprune.vision.processor import PrunedLlavaMultiModalProcessor
from vtprune_server import metrics


def install_prefetch(renderer: Any, workers: int) -> None:
    """Wrap `BaseRenderer._process_multimodal_async`, the coroutine that queues a request for the processor.

    Args:
        renderer: the engine client's renderer (`vllm.renderers.base.BaseRenderer`).
        workers: threads that decode, resize and wait for the tower.
    """
    processor = renderer.get_mm_processor()
    if not isinstance(processor, PrunedLlavaMultiModalProcessor):
        return
    process: Callable[..., Awaitable[Any]] = renderer._process_multimodal_async
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vtprune-prefetch")

    async def prefetch_and_process(
        prompt: list[int],
        mm_data: Any,
        *,
        mm_processor_kwargs: Any = None,
        media_io_kwargs: Any = None,
        **kwargs: Any,
    ) -> Any:
        settings = (mm_processor_kwargs, media_io_kwargs)
        hits, misses = await asyncio.get_running_loop().run_in_executor(
            pool, processor.prefetch, mm_data, *settings, renderer.mm_processor_cache
        )
        metrics.CACHE_HITS.inc(hits)
        metrics.CACHE_MISSES.inc(misses)
        metrics.CACHE_BYTES.set(processor.tower.cache.nbytes)
        return await process(
            prompt,
            mm_data,
            mm_processor_kwargs=mm_processor_kwargs,
            media_io_kwargs=media_io_kwargs,
            **kwargs,
        )

    renderer._process_multimodal_async = prefetch_and_process
