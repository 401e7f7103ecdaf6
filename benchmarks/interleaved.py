# SPDX-License-Identifier: Apache-2.0
"""Paired measurements: in each round every arm gets one block of requests, in a fresh random order.

All servers stay up, and blocks last a second or so. Whatever else the machine does in that time hits all arms
of a round alike, so ratios are taken within rounds and their median over rounds is reported (a randomised
complete block design). Every request carries a picture never sent before, so no cache answers for a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.arms import Arm
from benchmarks.rounds import Rounds, shuffled
from benchmarks.servers import RunningServer
from vtprune_loadtest.arrivals import ArrivalProcess
from vtprune_loadtest.client import ChatClient, Endpoint
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.images import DrawnPictures
from vtprune_loadtest.plan import LoadPoint, Phase
from vtprune_loadtest.record import RequestRecord, Role
from vtprune_loadtest.runner import PhaseRunner
from vtprune_loadtest.workload import IntRange, Workload, WorkloadSpec, picture_streams

_REQUEST_TIMEOUT_S = 900.0
# A server that has rested answers its first requests slowly: in blocks of half a second that weighed 12 % on
# a model that answers in 0.2 s.
_MIN_BLOCK_S = 1.5
# vLLM's worker polls its queue for a second after its last step (`SpinCondition` in
# `vllm.distributed.device_communicators.shm_broadcast`) and would take a core from the next block's server.
REST_S = 1.2


@dataclass(frozen=True)
class TrafficSpec:
    """What every request looks like.

    Attributes:
        images: pictures per prompt.
        output_len: tokens generated, whatever the model would say.
        picture_size: width and height in pixels; JPEG.
    """

    images: int = 1
    output_len: int = 16
    picture_size: tuple[int, int] = (640, 480)
    prompt: str = "What is in this picture?"
    seed: int = 0


@dataclass(frozen=True)
class Block:
    """One arm's block: means over its requests.

    Attributes:
        e2el_s: from sending a request to its last token.
        ttft_s: from sending a request to its first token.
        tpot_s: time per output token after the first; NaN where an answer came in one chunk.
        requests_per_s: requests over the block's duration.
        cpu_s: processor time of all of the server's processes per request.
        prompt_tokens: given to the language model, per request.
        vision_tokens_kept: per request; NaN from a server that does not report it.
        kv_tokens_kept: prompt tokens above the prune layer, per request; NaN likewise.
        tower_share: of the block's time, that in which the server's vision towers were at work; NaN likewise.
    """

    e2el_s: float
    ttft_s: float
    tpot_s: float
    requests_per_s: float
    cpu_s: float
    prompt_tokens: float
    vision_tokens_kept: float
    kv_tokens_kept: float
    tower_share: float


@dataclass
class LoadRounds(Rounds[Block]):
    """The rounds of one load point."""

    concurrency: int
    requests_per_block: int


class Comparison:
    """Sends blocks to running servers. Use `connected` to make one.

    Its pictures are distinct over all of its runs. Another comparison on the same servers needs another seed.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        servers: Mapping[str, RunningServer],
        clients: Mapping[str, ChatClient],
        model: str,
        traffic: TrafficSpec,
    ) -> None:
        self.arms = list(arms)
        self._servers = servers
        self._rng = np.random.default_rng([traffic.seed, 3])
        self._fastest_s: float | None = None
        self._last_block = -math.inf
        spec = WorkloadSpec(
            base={
                "model": model,
                "temperature": 0.0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
            },
            prompt=traffic.prompt,
            prompt_words=4,
            images_per_prompt=IntRange(traffic.images, traffic.images),
            output_len=IntRange(traffic.output_len, traffic.output_len),
            repeat_share=0.0,
            seed=traffic.seed,
        )
        pictures = DrawnPictures(*traffic.picture_size, "jpeg", traffic.seed)
        self._workload = Workload(picture_streams(spec, pictures, [arm.pixels for arm in self.arms]))
        settings = [arm.setting for arm in self.arms]
        run_id = f"paired-{time.time_ns():x}"
        self._runners = {
            name: PhaseRunner(
                client,
                self._workload,
                settings,
                ArrivalProcess.CONSTANT,
                self._rng,
                f"{run_id}-{name}",
                _ignore,
            )
            for name, client in clients.items()
        }

    async def _warm_up(self) -> float:
        """Two requests per arm; returns the seconds that the faster second one of all arms took."""
        fastest = math.inf
        for index in range(len(self.arms)):
            await self._block(index, 1, 1, 0)
            fastest = min(fastest, (await self._block(index, 1, 1, 0)).e2el_s)
        return fastest

    async def run(
        self,
        concurrency: int,
        *,
        seconds: float,
        max_rounds: int | None = None,
        min_rounds: int = 3,
        only: Collection[str] | None = None,
    ) -> LoadRounds:
        """Rounds at one concurrency, as many as fit into the time, `min_rounds` at least.

        Args:
            concurrency: requests in flight at once.
            seconds: the time; the first run's warm-up is not in it.
            max_rounds: even if there is time left.
            min_rounds: even if the time is over.
            only: labels of the arms that take part; None is all.

        Raises:
            LoadTestError: a request failed.
        """
        if self._fastest_s is None:
            self._fastest_s = await self._warm_up()
        requests = block_size(concurrency, self._fastest_s)
        taking_part = [i for i, arm in enumerate(self.arms) if only is None or arm.label in only]
        labels = [self.arms[i].label for i in taking_part]
        rounds = LoadRounds(labels, concurrency, requests)
        start, done = time.monotonic(), 0
        while done < (max_rounds or math.inf):
            elapsed = time.monotonic() - start
            if done >= min_rounds and elapsed * (done + 1) / done > seconds:
                break
            for index in shuffled(taking_part, self._rng):
                block = await self._block(index, concurrency, requests, done)
                rounds.blocks[self.arms[index].label].append(block)
            done += 1
        return rounds

    async def _block(self, index: int, concurrency: int, requests: int, turn: int) -> Block:
        arm = self.arms[index]
        await self._workload.prepare([requests * (i == index) for i in range(len(self.arms))])
        await asyncio.sleep(self._last_block + REST_S - time.monotonic())
        server = self._servers[arm.server]
        cpu, tower = server.process.cpu_seconds(), await server.tower_seconds()
        result = await self._runners[arm.server].run(
            Phase(Role.MEASURED, (index,), requests, None),
            LoadPoint(None, concurrency),
            (0, turn),
            asyncio.Event(),
        )
        cpu = server.process.cpu_seconds() - cpu
        tower = await server.tower_seconds() - tower
        self._last_block = time.monotonic()
        for record in result.records:
            if not record.ok:
                raise LoadTestError(
                    f"A request to {arm.label} failed: {record.error_kind}: {record.error_message}"
                )
        return _summary(result.records, result.duration_s, cpu, tower)


def block_size(concurrency: int, lone_request_s: float) -> int:
    """How many requests keep the fastest arm busy for about `_MIN_BLOCK_S`, the same number for every slot.

    Several in flight are taken to be served at up to four times the rate of one, as the smallest model is.
    """
    rate = min(concurrency, 4) / lone_request_s
    return concurrency * max(1, round(_MIN_BLOCK_S * rate / concurrency))


@contextlib.asynccontextmanager
async def connected(
    arms: Sequence[Arm], servers: Sequence[RunningServer], model: str, traffic: TrafficSpec
) -> AsyncIterator[Comparison]:
    """A comparison of arms on running servers that serve `model`."""
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for server in servers:
            endpoint = Endpoint(server.url, "/v1/chat/completions", {}, _REQUEST_TIMEOUT_S, verify_tls=False)
            clients[server.spec.name] = await stack.enter_async_context(ChatClient(endpoint))
        yield Comparison(arms, {server.spec.name: server for server in servers}, clients, model, traffic)


def _summary(records: Sequence[RequestRecord], duration_s: float, cpu_s: float, tower_s: float) -> Block:
    def reported(name: str) -> float:
        return float(np.mean([(r.vtprune or {}).get(name, math.nan) for r in records]))

    return Block(
        e2el_s=float(np.mean([r.e2el_s for r in records])),
        ttft_s=float(np.mean([r.ttft_s for r in records])),
        tpot_s=float(np.mean([math.nan if r.tpot_s is None else r.tpot_s for r in records])),
        requests_per_s=len(records) / duration_s,
        cpu_s=cpu_s / len(records),
        prompt_tokens=float(np.mean([r.prompt_tokens or math.nan for r in records])),
        vision_tokens_kept=reported("vision_tokens_kept"),
        kv_tokens_kept=reported("kv_tokens_kept"),
        tower_share=tower_s / duration_s,
    )


def _ignore(_record: RequestRecord) -> None:
    pass
