# SPDX-License-Identifier: Apache-2.0
"""Tower outputs on demand: cached per image, computed once, batched over concurrent callers.

The callers' own threads run the tower, one pass at a time (on a GPU a thread of its own does). While a pass
is under way, other callers' images queue up and form the next one, so batches grow with the load and a lone
request waits neither for company nor, on the CPU, for another thread to wake up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from vllm_vtprune.families.base import Item, Kept, Projected, TowerOutput
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.feature_cache import FeatureCache
from vllm_vtprune.vision.memory import PATCHES_PER_IMAGE
from vllm_vtprune.vision.outcomes import Outcomes
from vllm_vtprune.vision.transfer import output_on, outputs_on_host

logger = logging.getLogger(__name__)

A = TypeVar("A")
R = TypeVar("R")

# torch's choice, read at import: later vLLM's renderer lowers it for its own threads now and then
_TORCH_THREADS = torch.get_num_threads()
#: Multiply-adds of a pass, about 20 ms of one core, below which its threads would wait for each other for
#: longer than they save, and the engine wants the other cores.
_WORK_FOR_THREADS = 10**9


@dataclass(frozen=True, slots=True)
class _Job:
    key: str
    item: Item
    outputs: frozenset[str]
    future: Future[TowerOutput]


class VisionService:
    """Thread-safe access to the tower.

    Args:
        encoder: tower and projector.
        cache: where outputs are kept.
        max_batch: most images in one pass, of up to a thousand patches each; fewer larger ones.
        threads: CPU threads of a pass; 0 is torch's choice, and one for a pass of a few milliseconds.
        cache_on_host: the cache's entries are copied to the host and back, where the tower is on a device.
        answers_on_host: outputs are given on the host, for another process.
        own_thread: one thread runs all passes and projections, and not the callers': on a GPU each thread
            that computes has a workspace of cuBLAS's for good.
        observer: called after each pass with (images in it, seconds); for metrics.
        waiting_observer: called with each change in the number of images that wait for a pass, from the
            threads that make it; for metrics.

    Attributes:
        outcomes: what stayed of pictures, by setting.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        cache: FeatureCache,
        *,
        max_batch: int = 16,
        threads: int = 0,
        cache_on_host: bool = True,
        answers_on_host: bool = False,
        own_thread: bool = False,
        observer: Callable[[int, float], None] | None = None,
        waiting_observer: Callable[[int], None] | None = None,
    ) -> None:
        self.encoder = encoder
        self.cache = cache
        self.outcomes = Outcomes()
        self.observer = observer
        self.waiting_observer = waiting_observer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vtprune-tower") if own_thread else None
        self._max_batch = self._batch_limit = max_batch
        self._cache_on_host = cache_on_host
        self._answers_on_host = answers_on_host
        self._threads = threads
        self._waiting: deque[_Job] = deque()
        self._in_flight: dict[str, _Job] = {}
        self._running = False
        self._lock = threading.Lock()
        self._pass_done = threading.Condition(self._lock)

    @property
    def device(self) -> torch.device:
        """Where the tower runs."""
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Its precision."""
        return self.encoder.dtype

    def encode(
        self,
        keys: Sequence[str],
        prepare: Callable[[list[int]], Sequence[Item]],
        outputs: frozenset[str] = frozenset(),
    ) -> list[TowerOutput]:
        """The tower's outputs for some images; blocks until they are there.

        Args:
            keys: per image a key that names its content (and how it is preprocessed).
            prepare: given positions in `keys`, returns their preprocessed images. Called only for images that
                are neither cached nor on their way, in the caller's thread.
            outputs: the optional outputs wanted (`families.base.OPTIONAL_OUTPUTS`).

        Raises:
            Exception: whatever `prepare` or the tower raised.
        """
        found: list[TowerOutput | Future[TowerOutput] | None] = []
        with self._lock:
            for key in keys:
                entry = self.cache.get(key, outputs)
                job = self._in_flight.get(key)
                found.append(entry or (job.future if job is not None and outputs <= job.outputs else None))
        # the same picture twice in one prompt is encoded once
        missing = list({keys[i]: i for i in reversed(range(len(keys))) if found[i] is None}.values())[::-1]
        if missing:
            items = prepare(missing)
            submitted: dict[str, Future[TowerOutput]] = {}
            for i, item in zip(missing, items, strict=True):
                submitted[keys[i]] = self._submit(keys[i], item, outputs)
            found = [submitted[keys[i]] if entry is None else entry for i, entry in enumerate(found)]
        self._run_until_done([entry for entry in found if isinstance(entry, Future)])
        return [
            entry.result() if isinstance(entry, Future) else self._from_cache(entry)
            for entry in found
            if entry is not None
        ]

    def project(self, images: Sequence[Kept]) -> list[Projected]:
        """`VisionEncoder.project`; image by image, with the cache cleared, where memory runs out.

        Raises:
            torch.OutOfMemoryError: there is too little for one image alone.
        """
        return self._computed(self._project_in_parts, images)

    def _project_in_parts(self, images: Sequence[Kept]) -> list[Projected]:
        with suppress(torch.OutOfMemoryError):
            return self.encoder.project(images)
        self._make_room()
        return [self.encoder.project([image])[0] for image in images]

    def _computed(self, compute: Callable[[A], R], argument: A) -> R:
        """By the tower's own thread, where it has one."""
        return compute(argument) if self._thread is None else self._thread.submit(compute, argument).result()

    def available(self, keys: Iterable[str], outputs: frozenset[str] = frozenset()) -> int:
        """How many of these images are cached or on their way. For metrics: a moment later it may differ."""
        with self._lock:
            return sum(
                self.cache.get(key, outputs) is not None
                or (key in self._in_flight and outputs <= self._in_flight[key].outputs)
                for key in keys
            )

    def _submit(self, key: str, item: Item, outputs: frozenset[str]) -> Future[TowerOutput]:
        with self._lock:
            job = self._in_flight.get(key)
            if job is not None and outputs <= job.outputs:
                return job.future
            job = _Job(key, item, outputs, Future())
            self._in_flight[key] = job
            self._waiting.append(job)
            self._tell_waiting(1)
        return job.future

    def _run_until_done(self, futures: Sequence[Future[TowerOutput]]) -> None:
        """Run passes, whoever's images are in them, or wait for another caller's, until these are done."""
        while True:
            with self._pass_done:
                # no pass under way: what is not done is waiting, so there is a batch to run
                self._pass_done.wait_for(lambda: not self._running or all(f.done() for f in futures))
                if all(f.done() for f in futures):
                    return
                self._running = True
                batch = self._next_batch()
            try:
                self._tell_waiting(-len(batch))
                self._computed(self._run_batch, batch)
            finally:
                with self._pass_done:
                    self._running = False
                    self._pass_done.notify_all()

    def _tell_waiting(self, change: int) -> None:
        if self.waiting_observer is not None:
            self.waiting_observer(change)

    def _next_batch(self) -> list[_Job]:
        """The images that wait longest, up to `max_batch`; each thousand patches count as one more."""
        batch = [self._waiting.popleft()]
        size = self._size(batch[0])
        while self._waiting and size + self._size(self._waiting[0]) <= self._batch_limit:
            batch.append(self._waiting.popleft())
            size += self._size(batch[-1])
        return batch

    def _size(self, job: _Job) -> int:
        return -(-self.encoder.patches(job.item) // PATCHES_PER_IMAGE)

    def _threads_for(self, batch: list[_Job]) -> int:
        if self._threads:
            return self._threads
        if self.encoder.device.type != "cpu":
            return 1  # what is left for the CPU is copying
        return _TORCH_THREADS if sum(self.encoder.work(j.item) for j in batch) >= _WORK_FOR_THREADS else 1

    def _run_batch(self, batch: list[_Job]) -> None:
        with _torch_threads(self._threads_for(batch)):
            self._run_pass(batch)

    def _run_pass(self, batch: list[_Job]) -> None:
        started = time.perf_counter()
        try:
            wanted = frozenset[str]().union(*(job.outputs for job in batch))
            results = self._encode_in_parts([job.item for job in batch], wanted)
            seconds = time.perf_counter() - started
            results = self._to_cache(batch, results)
        except BaseException as error:
            results = [error for _ in batch]
        self._finish(batch)
        for job, result in zip(batch, results, strict=True):
            if isinstance(result, BaseException):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)
        done = sum(isinstance(result, TowerOutput) for result in results)
        if self.observer is not None and done:
            self.observer(done, seconds)

    def _encode_in_parts(
        self, items: Sequence[Item], outputs: frozenset[str]
    ) -> list[TowerOutput | BaseException]:
        """The tower's outputs, in one pass, or in smaller ones where the device's memory runs out.

        An image for which alone there is too little has the error in its place, and the others their outputs.
        """
        try:
            results: list[TowerOutput | BaseException] = [*self.encoder.encode(items, outputs)]
        except torch.OutOfMemoryError as error:
            # its frames hold the tensors of the pass that failed
            failure = error.with_traceback(None)
        else:
            self._batch_limit = min(self._batch_limit + 1, self._max_batch)
            return results
        self._make_room()
        if len(items) == 1:
            try:
                return [*self.encoder.encode(items, outputs)]
            except torch.OutOfMemoryError:
                logger.error(
                    "vtprune: a picture of %d patches does not fit into what is left of %s's memory: let "
                    "smaller ones in, or lower --gpu-memory-utilization.",
                    self.encoder.patches(items[0]),
                    self.encoder.device,
                )
                return [failure]
        half = len(items) // 2
        self._batch_limit = min(self._batch_limit, half)
        logger.warning(
            "vtprune: %s's memory ran out in a pass of %d images; the next hold at most %d, and grow again.",
            self.encoder.device,
            len(items),
            half,
        )
        return [
            *self._encode_in_parts(items[:half], outputs),
            *self._encode_in_parts(items[half:], outputs),
        ]

    def _make_room(self) -> None:
        """Give back what the device's memory is not needed for."""
        if not self._cache_on_host:
            self.cache.clear()
        if self.encoder.device.type == "cuda":
            torch.cuda.empty_cache()

    def _to_cache(
        self, batch: Sequence[_Job], results: Sequence[TowerOutput | BaseException]
    ) -> list[TowerOutput | BaseException]:
        """Keep a pass's outputs; gives what the callers get."""
        answers = list(results)
        done = [i for i, result in enumerate(results) if isinstance(result, TowerOutput)]
        here = [cast(TowerOutput, results[i]) for i in done]
        on_device = self.encoder.device.type != "cpu"
        there = here
        if on_device and (self._answers_on_host or (self._cache_on_host and self.cache.capacity)):
            there = outputs_on_host(here, pinned=self.cache.pinned)
        for i, output, copy in zip(done, here, there, strict=True):
            self.cache.put(batch[i].key, copy if self._cache_on_host else output)
            answers[i] = copy if self._answers_on_host else output
        return answers

    def _from_cache(self, entry: TowerOutput) -> TowerOutput:
        if self.encoder.device.type == "cpu" or self._cache_on_host == self._answers_on_host:
            return entry
        return output_on(entry, torch.device("cpu") if self._answers_on_host else self.encoder.device)

    def _finish(self, batch: list[_Job]) -> None:
        with self._lock:
            for job in batch:
                if self._in_flight.get(job.key) is job:
                    del self._in_flight[job.key]


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """A pass may use more threads than the one that vLLM gives its renderer (`BaseRenderer`)."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
