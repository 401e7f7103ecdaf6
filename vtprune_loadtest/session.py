# SPDX-License-Identifier: Apache-2.0
"""One whole load test: asks the server what it serves, runs every load point's phases, keeps the records."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from vtprune_loadtest.asking import QuestionStream
from vtprune_loadtest.client import ChatClient
from vtprune_loadtest.config import IgnoreEos, LoadTestConfig
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.images import PicturesUsedUp
from vtprune_loadtest.interrupt import until_stopped
from vtprune_loadtest.plan import (
    LoadPoint,
    Phase,
    capacity_phases,
    plan_phases,
    requests_needed,
    total_requests,
)
from vtprune_loadtest.preflight import require_sizes, require_vtprune
from vtprune_loadtest.prometheus import Counters, counter_deltas, parse_counters
from vtprune_loadtest.record import RequestRecord, Role
from vtprune_loadtest.runner import PhaseResult, PhaseRunner
from vtprune_loadtest.workload import RequestStream, Workload, WorkloadSpec, picture_streams

_METRICS_PATH = "/metrics"
_POLL_S = 1.0
#: Where a rate is given as a multiple of the capacity: the closed loop that measures it.
_CAPACITY_POINT = LoadPoint(None, 16)


class Progress:
    """What a session tells about its way; this one says nothing."""

    def expect(self, requests: int | None, what: str) -> None:
        """A load point begins, with this many requests (None: unknown)."""

    def done(self, record: RequestRecord) -> None:
        """A request has been answered or has failed."""


@dataclass
class PointResult:
    """The phases of one load point; `client_cpu_share` is this process's share of one core meanwhile."""

    point: LoadPoint
    phases: list[PhaseResult] = field(default_factory=list)
    client_cpu_share: float = 0.0


@dataclass
class SessionResult:
    """Everything measured. `interrupted` if the user stopped it; what was measured until then is here."""

    started: datetime
    model: str
    server: dict[str, Any]
    points: list[PointResult] = field(default_factory=list)
    interrupted: bool = False


async def run_session(config: LoadTestConfig, progress: Progress, stop: asyncio.Event) -> SessionResult:
    """Run the load test; setting `stop` ends it early with what there is.

    Raises:
        LoadTestError: the server cannot be reached, lists no model, does not read the settings under test,
            or refuses every warm-up request of a setting.
    """
    async with ChatClient(config.endpoint) as client:
        model, is_vllm = await _first_model(client, config)
        result = SessionResult(
            datetime.now().astimezone(), config.model or model, await _describe_server(client)
        )
        await require_vtprune(client, config, result.model)
        await require_sizes(client, config)
        base: dict[str, Any] = {
            "model": result.model,
            "temperature": config.temperature,
            "stream": True,
        }
        if config.include_usage:
            base["stream_options"] = {"include_usage": True}
        if config.ignore_eos is IgnoreEos.ON or (config.ignore_eos is IgnoreEos.AUTO and is_vllm):
            base["ignore_eos"] = True
        workload = Workload(_streams(config, base | config.extra_body))
        rng = np.random.default_rng([config.seed, 2])
        run_id = f"load-{config.seed}-{time.time_ns():x}"
        runner = PhaseRunner(client, workload, config.settings, config.process, rng, run_id, progress.done)
        session = _Session(config, client, workload, runner, rng, progress.expect, stop)
        points = list(config.points)
        if any(point.times_capacity is not None for point in points):
            measured = await session.run_phases(
                0, _CAPACITY_POINT, capacity_phases(config.amount, config.warmup)
            )
            result.points.append(measured)
            if stop.is_set():
                result.interrupted = True
                return result
            points = [point.at(_capacity(measured)) for point in points]
        for number, point in enumerate(points, start=len(result.points)):
            result.points.append(await session.run_point(number, point))
            if stop.is_set():
                result.interrupted = True
                break
        return result


@dataclass
class _Session:
    config: LoadTestConfig
    client: ChatClient
    workload: Workload
    runner: PhaseRunner
    rng: np.random.Generator
    expect: Callable[[int | None, str], None]
    stop: asyncio.Event

    async def run_point(self, number: int, point: LoadPoint) -> PointResult:
        config, settings = self.config, len(self.config.settings)
        phases = plan_phases(
            point,
            settings,
            config.amount,
            config.interleave,
            config.rounds,
            config.warmup,
            config.ramp_s,
            self.rng,
        )
        return await self.run_phases(number, point, phases)

    async def run_phases(self, number: int, point: LoadPoint, phases: list[Phase]) -> PointResult:
        """Run a load point's phases, with all bodies prepared as far as their number is known."""
        settings = len(self.config.settings)
        ahead = max(16, 2 * (point.concurrency or 0))
        counts, all_known = requests_needed(phases, point, settings, ahead)
        try:
            await until_stopped(self.workload.prepare(counts), self.stop)
        except PicturesUsedUp:
            if all_known:
                raise
        refill = None
        if not (all_known and self.workload.has_ready(counts)):
            refill = asyncio.create_task(self.workload.keep_ready([ahead] * settings))
        self.expect(total_requests(phases, point), point.describe())
        result = PointResult(point)
        cpu_s = wall_s = 0.0
        try:
            for index, phase in enumerate(phases):
                before = await self._counters()
                cpu, wall = time.process_time(), time.perf_counter()
                outcome = await self.runner.run(phase, point, (number, index), self.stop)
                if phase.role is Role.MEASURED:
                    cpu_s += time.process_time() - cpu
                    wall_s += time.perf_counter() - wall
                after = await self._counters()
                if before is not None and after is not None:
                    outcome.counters = counter_deltas(before, after)
                result.phases.append(outcome)
                if outcome.cut_short is not None:
                    break
                _check_warmup(outcome)
        finally:
            if refill is not None:
                refill.cancel()
        result.client_cpu_share = cpu_s / wall_s if wall_s else 0.0
        return result

    async def _counters(self) -> Counters | None:
        text = await self.client.get_text(_METRICS_PATH)
        try:
            return None if text is None else parse_counters(text)
        except ValueError:  # a page at /metrics that is no Prometheus exposition
            return None


def _streams(config: LoadTestConfig, base: dict[str, Any]) -> Sequence[RequestStream]:
    """Each setting's requests."""
    pixels = [setting.pixels for setting in config.settings]
    if (book := config.questions) is not None:
        return [
            QuestionStream(base, config.output_len, config.seed, book, setting, pixels)
            for setting in range(len(pixels))
        ]
    spec = WorkloadSpec(
        base=base,
        prompt=config.prompt,
        prompt_words=config.prompt_words,
        images_per_prompt=config.images_per_prompt,
        output_len=config.output_len,
        repeat_share=config.repeat_share,
        seed=config.seed,
    )
    return picture_streams(spec, config.pictures, pixels)


def _capacity(measured: PointResult) -> float:
    """Answers per second of a closed loop.

    Raises:
        LoadTestError: nothing was answered.
    """
    (phase,) = (p for p in measured.phases if p.phase.role is Role.MEASURED)
    answered = sum(record.ok for record in phase.records if record.role is Role.MEASURED)
    if not answered or not phase.duration_s:
        raise LoadTestError(
            "No request was answered while the capacity was measured: give --rate in requests per second."
        )
    return answered / phase.duration_s


def _check_warmup(outcome: PhaseResult) -> None:
    """Stop before measuring what cannot work, such as a preset the server does not know."""
    if outcome.phase.role is not Role.WARMUP:
        return
    for label in dict.fromkeys(record.setting for record in outcome.records):
        records = [record for record in outcome.records if record.setting == label]
        if not any(record.ok for record in records):
            raise LoadTestError(
                f"Every warm-up request of the setting {label!r} failed, the first with "
                f"{records[0].error_kind}: {records[0].error_message}"
            )


async def _first_model(client: ChatClient, config: LoadTestConfig) -> tuple[str, bool]:
    """The first model's name and whether vLLM serves it, as soon as the server answers."""
    deadline = time.monotonic() + config.ready_timeout_s
    while True:
        try:
            listing = await client.get_json("/v1/models")
            break
        except LoadTestError:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(_POLL_S)
    try:
        card = listing["data"][0]
        return str(card["id"]), card.get("owned_by") == "vllm"
    except (AttributeError, LookupError, TypeError):
        if config.model is not None:
            return config.model, False
        raise LoadTestError("The server lists no model at /v1/models: name one with --model.") from None


async def _describe_server(client: ChatClient) -> dict[str, Any]:
    """What the server says of its version, where it says anything."""
    try:
        version = await client.get_json("/version")
    except LoadTestError:
        return {}
    return version if isinstance(version, dict) else {}
