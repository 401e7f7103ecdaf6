# SPDX-License-Identifier: Apache-2.0
"""Tower outputs on demand: cached per image, computed once, batched over concurrent callers.

The callers' own threads run the tower, one pass at a time. While a pass is under way, other callers' images
queue up and form the next one, so batches grow with the load and a lone request waits neither for company nor
for another thread to wake up.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from vllm_vtprune.context import plugin_context
from vllm_vtprune.families.base import Item, TowerOutput
from vllm_vtprune.vision.encoder import VisionEncoder
from vllm_vtprune.vision.feature_cache import FeatureCache
from vllm_vtprune.vision.outcomes import Outcomes

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# torch's choice, read at import: later vLLM's renderer lowers it for its own threads now and then
_TORCH_THREADS = torch.get_num_threads()
#: Multiply-adds of a pass, about 20 ms of one core, below which its threads would wait for each other for
#: longer than they save, and the engine wants the other cores.
_WORK_FOR_THREADS = 10**9
#: Pictures of up to as many patches count as one in a pass, larger ones as several.
_PATCHES_PER_IMAGE = 1024


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
        observer: Callable[[int, float], None] | None = None,
        waiting_observer: Callable[[int], None] | None = None,
    ) -> None:
        self.encoder = encoder
        self.cache = cache
        self.outcomes = Outcomes()
        self.observer = observer
        self.waiting_observer = waiting_observer
        self._max_batch = max_batch
        self._threads = threads
        self._waiting: deque[_Job] = deque()
        self._in_flight: dict[str, _Job] = {}
        self._running = False
        self._lock = threading.Lock()
        self._pass_done = threading.Condition(self._lock)

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
            entry.result() if isinstance(entry, Future) else entry for entry in found if entry is not None
        ]

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
                with _torch_threads(self._threads_for(batch)):
                    self._run_batch(batch)
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
        while self._waiting and size + self._size(self._waiting[0]) <= self._max_batch:
            batch.append(self._waiting.popleft())
            size += self._size(batch[-1])
        return batch

    def _size(self, job: _Job) -> int:
        return -(-self.encoder.patches(job.item) // _PATCHES_PER_IMAGE)

    def _threads_for(self, batch: list[_Job]) -> int:
        if self._threads:
            return self._threads
        return _TORCH_THREADS if sum(self.encoder.work(j.item) for j in batch) >= _WORK_FOR_THREADS else 1

    def _run_batch(self, batch: list[_Job]) -> None:
        started = time.perf_counter()
        try:
            wanted = frozenset[str]().union(*(job.outputs for job in batch))
            results = self.encoder.encode([job.item for job in batch], wanted)
        except BaseException as error:
            self._finish(batch)
            for job in batch:
                job.future.set_exception(error)
            return
        for job, result in zip(batch, results, strict=True):
            self.cache.put(job.key, result)
        self._finish(batch)
        for job, result in zip(batch, results, strict=True):
            job.future.set_result(result)
        if self.observer is not None:
            self.observer(len(batch), time.perf_counter() - started)

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


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_services: dict[tuple[str, ...], VisionService] = {}
_services_lock = threading.Lock()


def vision_service(model_config: ModelConfig) -> VisionService:
    """The process's tower for this model; loads it the first time.

    Raises:
        CheckpointError: tower or projector cannot be loaded from the checkpoint.
        ValueError: `encoder_device` or `encoder_dtype` names none torch knows.
    """
    context = plugin_context(model_config)
    policy = context.policy
    device = _device(policy.encoder_device)
    # vLLM has resolved the model's dtype to torch's by the time a processor exists
    model_dtype = cast(torch.dtype, model_config.dtype)
    dtype = _dtype(policy.encoder_dtype, model_dtype)
    key = (
        model_config.model,
        str(model_config.revision),
        str(device),
        str(dtype),
        str(context.dummy_weights),
    )
    with _services_lock:
        service = _services.get(key)
        if service is None:
            encoder = VisionEncoder.load(
                model_config.hf_config,
                model_config.model,
                device=device,
                dtype=dtype,
                revision=model_config.revision,
                download_dir=context.download_dir,
                dummy=context.dummy_weights,
            )
            service = _services[key] = VisionService(
                encoder,
                FeatureCache(int(policy.feature_cache_gb * 2**30)),
                max_batch=policy.encoder_batch,
                threads=policy.encoder_threads,
            )
        return service


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"encoder_device is {name!r}: use auto, cpu, or a device such as cuda:0.") from error


def _dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    if name == "auto":
        return model_dtype
    if name not in _DTYPES:
        raise ValueError(f"encoder_dtype is {name!r}: use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]
