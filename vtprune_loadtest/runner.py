# SPDX-License-Identifier: Apache-2.0
"""Runs one phase: decides when each request goes out, and collects the records."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from vtprune_loadtest.arrivals import ArrivalProcess, arrival_times, ramp_times
from vtprune_loadtest.client import ChatClient
from vtprune_loadtest.images import PicturesUsedUp
from vtprune_loadtest.interrupt import until_stopped
from vtprune_loadtest.plan import LoadPoint, Phase
from vtprune_loadtest.prometheus import Counters
from vtprune_loadtest.record import RequestRecord, Role
from vtprune_loadtest.sweep import SweepSetting, balanced_order
from vtprune_loadtest.workload import Workload


@dataclass
class PhaseResult:
    """What a phase brought.

    Attributes:
        duration_s: from the end of the ramp until the last measured answer was in (or the interruption).
        counters: how much the server's counters grew, warm-up and ramp of this phase included; None without
            /metrics.
        cut_short: a sentence if it ended early.
    """

    phase: Phase
    records: list[RequestRecord] = field(default_factory=list)
    duration_s: float = 0.0
    counters: Counters | None = None
    cut_short: str | None = None


class PhaseRunner:
    """Sends phases' requests; one object per run, so request ids and the clock's zero are the run's."""

    def __init__(
        self,
        client: ChatClient,
        workload: Workload,
        settings: Sequence[SweepSetting],
        process: ArrivalProcess,
        rng: np.random.Generator,
        run_id: str,
        on_done: Callable[[RequestRecord], None],
    ) -> None:
        """Time zero of the run is now; `on_done` is called with each finished record."""
        self._client = client
        self._workload = workload
        self._settings = settings
        self._process = process
        self._rng = rng
        self._ids: Iterator[str] = (f"{run_id}-{number}" for number in count())
        self._on_done = on_done
        self._epoch = time.perf_counter()

    async def run(
        self, phase: Phase, point: LoadPoint, numbers: tuple[int, int], stop: asyncio.Event
    ) -> PhaseResult:
        """Run the phase to its end, or until `stop` is set: then requests in flight are dropped, unrecorded.

        `numbers` are the load point's and the phase's, for the records.
        """
        turn = _Turn(phase, point, numbers, PhaseResult(phase))
        start = self._now()
        loop = self._closed_loop(turn) if point.is_closed else self._open_loop(turn)
        await until_stopped(loop, stop)
        if stop.is_set():
            turn.result.cut_short = "interrupted"
        answered = [record.done_s for record in turn.result.records if record.role is not Role.RAMP]
        end = max(answered) if answered and not stop.is_set() else self._now()
        turn.result.duration_s = max(0.0, end - start - phase.ramp_s)
        return turn.result

    async def _closed_loop(self, turn: "_Turn") -> None:
        """Each worker sends when its last request is answered; the workers start over the ramp's time."""
        phase, workers = turn.phase, turn.point.concurrency or 1
        start = self._now()
        orders = {role: self._order(phase) for role in (Role.RAMP, phase.role)}
        left = phase.requests
        until = float("inf") if phase.duration_s is None else start + phase.ramp_s + phase.duration_s

        async def work(number: int) -> None:
            nonlocal left
            await self._sleep_until(start + phase.ramp_s * number / workers)
            while (now := self._now()) < until and left != 0 and turn.result.cut_short is None:
                role = Role.RAMP if now < start + phase.ramp_s else phase.role
                if role is phase.role and left is not None:
                    left -= 1
                await self._send(turn, next(orders[role]), role, intended_s=now)

        async with asyncio.TaskGroup() as group:
            for number in range(workers):
                group.create_task(work(number))

    async def _open_loop(self, turn: "_Turn") -> None:
        """Requests go out at times fixed beforehand, or as soon after as the cap has a free slot."""
        phase, rate = turn.phase, turn.point.rate
        if rate is None or phase.requests is None:
            raise ValueError("an open loop needs a rate and a number of requests")
        rng = self._rng.spawn(1)[0]
        ramp = ramp_times(rate, phase.ramp_s, self._process, rng)
        times = phase.ramp_s + arrival_times(phase.requests, rate, self._process, rng)
        arrivals = [(at, Role.RAMP) for at in ramp.tolist()] + [(at, phase.role) for at in times.tolist()]
        orders = {role: self._order(phase) for role in (Role.RAMP, phase.role)}
        cap = turn.point.concurrency
        slots = contextlib.nullcontext() if cap is None else asyncio.Semaphore(cap)

        async def send_when_free(setting: int, role: Role, intended_s: float) -> None:
            async with slots:
                await self._send(turn, setting, role, intended_s)

        start = self._now()
        async with asyncio.TaskGroup() as group:
            for at, role in arrivals:
                await self._sleep_until(start + at)
                if turn.result.cut_short is not None:
                    return
                group.create_task(send_when_free(next(orders[role]), role, start + at))

    async def _send(self, turn: "_Turn", setting: int, role: Role, intended_s: float) -> None:
        try:
            request = await self._workload.take(setting)
        except PicturesUsedUp as error:
            turn.result.cut_short = str(error)
            return
        load_point, phase = turn.numbers
        record = RequestRecord(
            request_id=next(self._ids),
            setting=self._settings[setting].label,
            role=role,
            load_point=load_point,
            phase=phase,
            images=request.images,
            repeated_images=request.repeated_images,
            max_tokens=request.max_tokens,
            question=request.question,
            intended_s=intended_s,
            sent_s=self._now(),
        )
        await self._client.stream_chat(
            request.body, dict(self._settings[setting].headers), record, self._epoch
        )
        turn.result.records.append(record)
        self._on_done(record)

    def _order(self, phase: Phase) -> Iterator[int]:
        order = balanced_order(len(phase.settings), self._rng.spawn(1)[0])
        return (phase.settings[index] for index in order)

    def _now(self) -> float:
        return time.perf_counter() - self._epoch

    async def _sleep_until(self, at: float) -> None:
        if (wait := at - self._now()) > 0:
            await asyncio.sleep(wait)


@dataclass
class _Turn:
    """A phase while it runs."""

    phase: Phase
    point: LoadPoint
    numbers: tuple[int, int]
    result: PhaseResult
