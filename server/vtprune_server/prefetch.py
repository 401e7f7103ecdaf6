# SPDX-License-Identifier: Apache-2.0
"""Lets concurrent requests share a pass of the vision tower.

vLLM runs its multimodal processor on one thread, request after request (`BaseRenderer._mm_executor`). While
that thread is taken, other requests' tower work is done beforehand on a few threads, where it is batched
(`vision.service`); the processor then finds its outputs in the cache. A lone request stays on the
processor's thread: each hand-over between threads costs it time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from vllm.utils.async_utils import make_async
from vllm.utils.torch_utils import set_default_torch_num_threads

from vllm_vtprune.vision.placeholders import FIELDS
from vllm_vtprune.vision.processor import PrunedProcessor
from vtprune_server import metrics
from vtprune_server.resend import make_resendable


class _Queued:
    """A request's images in `vtprune_tower_waiting_images` until a thread takes the request up."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._lock = threading.Lock()
        metrics.count_waiting_images(images)

    def leave(self) -> None:
        """Count them no longer; more calls change nothing."""
        with self._lock:
            metrics.count_waiting_images(-self._images)
            self._images = 0


def _media_in(mm_data: Any) -> int:
    """Images and videos of a request."""
    found = [mm_data.get(modality) for modality in FIELDS] if isinstance(mm_data, Mapping) else []
    return sum(len(media) if isinstance(media, list) else int(media is not None) for media in found)


def install_prefetch(renderer: Any, workers: int) -> None:
    """Wrap `BaseRenderer._process_multimodal_async`, the coroutine that queues a request for the processor.

    Args:
        renderer: the engine client's renderer (`vllm.renderers.base.BaseRenderer`).
        workers: threads that decode, resize and wait for the tower.
    """
    processor = renderer.get_mm_processor()
    if not isinstance(processor, PrunedProcessor):
        return
    process = renderer._process_multimodal_async
    # with the torch threads of `BaseRenderer._process_multimodal`: preprocessing in a team for each of these
    # would keep all cores busy with waiting for each other
    with set_default_torch_num_threads():
        team = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        workers, "vtprune-prefetch", initializer=torch.set_num_threads, initargs=(team,)
    )
    in_flight = 0

    def prefetch_then_process(
        prefetch: Callable[[], tuple[int, int]], /, *args: Any, **kwargs: Any
    ) -> tuple[tuple[int, int], Any]:
        with set_default_torch_num_threads():
            counts = prefetch()
        return counts, renderer._process_multimodal(*args, **kwargs)

    both = make_async(prefetch_then_process, executor=renderer._mm_executor)

    async def prefetch_and_process(
        prompt: list[int],
        mm_data: Any,
        *,
        mm_processor_kwargs: Any = None,
        media_io_kwargs: Any = None,
        **kwargs: Any,
    ) -> Any:
        nonlocal in_flight
        kwargs |= {"mm_processor_kwargs": mm_processor_kwargs, "media_io_kwargs": media_io_kwargs}
        cache = renderer.mm_processor_cache
        queued = _Queued(_media_in(mm_data))

        def prefetch() -> tuple[int, int]:
            queued.leave()  # those without an output are counted on by `vision.service`
            return processor.prefetch(mm_data, mm_processor_kwargs, media_io_kwargs, cache)

        in_flight += 1
        try:
            if in_flight == 1:
                counts, result = await both(prefetch, prompt, mm_data, **kwargs)
            else:
                counts = await asyncio.get_running_loop().run_in_executor(pool, prefetch)
                result = await process(prompt, mm_data, **kwargs)
        finally:
            in_flight -= 1
            queued.leave()  # where the client has gone before a thread was free
        hits, misses = counts
        metrics.CACHE_HITS.inc(hits)
        metrics.CACHE_MISSES.inc(misses)
        metrics.CACHE_BYTES.set(processor.vision.cache.nbytes)
        make_resendable(result, partial(prefetch_and_process, prompt, mm_data, **kwargs))
        return result

    renderer._process_multimodal_async = prefetch_and_process
