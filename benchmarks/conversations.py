# SPDX-License-Identifier: Apache-2.0
"""Conversations about one picture: what each stage of pruning costs and saves turn by turn.

    python -m benchmarks.conversations                       # decoder-150m, five turns, concurrency 1 and 4
    python -m benchmarks.conversations --system 0,512 --rounds 6 --json out.json

A prompt that loses tokens in the decoder neither reads nor fills the prefix cache, so each of its turns pays
for the whole prompt again, where an unpruned turn pays for what is new. Arms take turns on one server with a
prune layer: nothing pruned, stage 1 alone, stage 2 alone, both, both at the first turn only, and both where
later turns go on from what the first one kept (`--vtprune-kv-reuse true`, which the other arms refuse). In
each round every arm holds as many conversations at once as the concurrency says, each about a picture of its
own; the system prompt is the same for all and in the prefix cache beforehand, as a server's is. Answers in
the history are fixed text, so that all arms are asked the same. Ratios are taken within rounds.
"""

from __future__ import annotations

import asyncio
import base64
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks import machine
from benchmarks.arms import parse_arms
from benchmarks.commands import bench_parser, write_json
from benchmarks.models import BenchModel, model_named
from benchmarks.rounds import shuffled
from benchmarks.servers import ServerSpec, pruning_kv, running
from vtprune_loadtest.client import ChatClient, Endpoint
from vtprune_loadtest.columns import columns
from vtprune_loadtest.command import command
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.images import DrawnPictures
from vtprune_loadtest.record import RequestRecord, Role
from vtprune_loadtest.spread import Spread

STAGE_1, STAGE_2, BOTH = "keep0.22", "kv0.5", "keep0.22+kv0.5"
#: Both at the first turn, stage 1 alone afterwards.
FIRST = f"{BOTH}, turn 1"
#: Both at every turn, each going on from what the first one kept.
GOING_ON = f"{BOTH}, going on"
ARMS = ("off", STAGE_1, STAGE_2, BOTH, FIRST, GOING_ON)
QUESTIONS = (
    "What is in this picture?",
    "What colour is the largest shape?",
    "Is anything left of it?",
    "How many shapes do you see in all?",
    "Which of them lies highest?",
)
ANSWER = "There are some shapes."
_STARTS_OVER = {"X-VTPrune-KV-Reuse": "off"}
_SYSTEM = "You answer questions about pictures briefly and exactly, and you say so where you cannot see. "
_SIZE = (640, 480)
_TIMEOUT_S = 600.0
_WIDTH = 120


@dataclass(frozen=True)
class Talk:
    """How conversations go.

    Attributes:
        turns: questions of each.
        system: characters of the system prompt, which are tokens of the benchmark's models.
        output: tokens of each answer.
        concurrency: conversations at once.
    """

    turns: int
    system: int
    output: int
    concurrency: int

    def messages(self, turn: int, picture: str) -> list[dict[str, Any]]:
        """The request of a turn, from 0."""
        system = (_SYSTEM * (self.system // len(_SYSTEM) + 1))[: self.system]
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for number in range(turn + 1):
            content: list[dict[str, Any]] = [{"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
            if number == 0:
                content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
            messages.append({"role": "user", "content": content})
            if number < turn:
                messages.append({"role": "assistant", "content": ANSWER})
        return messages


@dataclass(frozen=True)
class Held:
    """One arm's conversations of one round.

    Attributes:
        ttft_s: time to first token by turn, mean over conversations, [turns].
        turns_per_s: turns of all of them per second.
    """

    ttft_s: tuple[float, ...]
    turns_per_s: float


def stops_paying(both: Sequence[Sequence[float]], alone: Sequence[Sequence[float]]) -> int | None:
    """The first turn, from 1, from which on stage 2 makes every turn slower; None where the last is faster.

    Args:
        both: time to first token by turn with stage 2, [rounds, turns].
        alone: without it, in the same rounds.
    """
    ratios = np.median(np.asarray(both) / np.asarray(alone), axis=0)
    faster = np.flatnonzero(ratios < 1)
    first = int(faster[-1]) + 2 if len(faster) else 1
    return first if first <= len(ratios) else None


def has_cost(both: Sequence[Sequence[float]], alone: Sequence[Sequence[float]]) -> int | None:
    """The turn, from 1, by which the waiting of all turns so far is longer with stage 2; None if never."""
    sums = [[list(accumulate(turns)) for turns in arm] for arm in (both, alone)]
    ratios = np.median(np.asarray(sums[0]) / np.asarray(sums[1]), axis=0)
    slower = np.flatnonzero(ratios > 1)
    return int(slower[0]) + 1 if len(slower) else None


class Conversations:
    """Holds conversations on a server."""

    def __init__(self, client: ChatClient, model: str, headers: Mapping[str, Mapping[str, str]]) -> None:
        """Begin with the first picture.

        Args:
            client: of the server.
            model: its served name.
            headers: of each arm.
        """
        self._client, self._model, self._headers = client, model, headers
        self._pictures = DrawnPictures(*_SIZE, "jpeg", seed=int(time.time()))
        self._drawn = 0

    async def hold(self, arm: str, talk: Talk) -> Held:
        """One arm's conversations, all at once.

        Raises:
            LoadTestError: a request failed.
        """
        pictures = [self._picture() for _ in range(talk.concurrency)]
        start = time.perf_counter()
        held = await asyncio.gather(*(self._one(arm, talk, picture) for picture in pictures))
        seconds = time.perf_counter() - start
        means = tuple(float(x) for x in np.mean(held, axis=0))
        return Held(means, talk.turns * talk.concurrency / seconds)

    async def _one(self, arm: str, talk: Talk, picture: str) -> list[float]:
        waited = []
        for turn in range(talk.turns):
            body = {
                "model": self._model,
                "messages": talk.messages(turn, picture),
                "max_tokens": talk.output,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            record = RequestRecord(
                f"{arm}-{self._drawn}-{turn}", arm, Role.MEASURED, 0, 0, 1, 0, talk.output, 0.0, 0.0
            )
            asked = (STAGE_1 if turn else BOTH) if arm == FIRST else arm
            await self._client.stream_chat(json.dumps(body).encode(), self._headers[asked], record, 0.0)
            if not record.ok or not record.token_times_s:
                raise LoadTestError(
                    f"Turn {turn + 1} of {arm} failed: {record.error_kind}: {record.error_message}"
                )
            waited.append(record.ttft_s)
        return waited

    def _picture(self) -> str:
        picture = self._pictures.picture(self._drawn)
        self._drawn += 1
        return f"data:{picture.mime_type};base64,{base64.b64encode(picture.data).decode()}"


async def measure(conversations: Conversations, talk: Talk, rounds: int) -> dict[str, list[Held]]:
    """Rounds of all arms, each round in an order of its own; one before them is thrown away."""
    rng = np.random.default_rng(0)
    held: dict[str, list[Held]] = {arm: [] for arm in ARMS}
    for number in tqdm(range(rounds + 1), "rounds", leave=False, disable=None):
        for arm in shuffled(ARMS, rng):
            result = await conversations.hold(arm, talk)
            if number:
                held[arm].append(result)
    return held


def report(talk: Talk, held: Mapping[str, Sequence[Held]]) -> str:
    """A table by turn, and at which turn stage 2 stops paying."""
    waits = {arm: [one.ttft_s for one in rounds] for arm, rounds in held.items()}
    rows = []
    for arm in ARMS:
        throughput = Spread.of(
            [a.turns_per_s / b.turns_per_s for a, b in zip(held[arm], held["off"], strict=True)]
        )
        medians = np.median(np.asarray(waits[arm]), axis=0)
        rows.append(
            [
                arm,
                *(f"{1000 * wait:.0f}" for wait in medians),
                f"{1000 * float(medians.sum()):.0f}",
                f"{np.median([one.turns_per_s for one in held[arm]]):.2f}",
                f"{throughput.median:.2f} ({throughput.low:.2f} to {throughput.high:.2f})",
            ]
        )
    turns = [f"turn {turn + 1}" for turn in range(talk.turns)]
    about = f"system prompt of {talk.system} tokens, {talk.concurrency} at once, {len(held['off'])} rounds"
    return "\n".join(
        [
            f"\n{about}: time to first token in ms by turn",
            *columns(["arm", *turns, "in all", "turns/s", "ratio to off"], rows, width=_WIDTH),
            _verdict("stage 2 on top of stage 1", waits[BOTH], waits[STAGE_1]),
            _verdict("stage 2 at the first turn only", waits[FIRST], waits[STAGE_1]),
            _verdict("stage 2 going on from the first turn", waits[GOING_ON], waits[STAGE_1]),
            _verdict("stage 2 alone", waits[STAGE_2], waits["off"]),
        ]
    )


def _verdict(what: str, both: Sequence[Sequence[float]], alone: Sequence[Sequence[float]]) -> str:
    turn, paid = stops_paying(both, alone), has_cost(both, alone)
    if turn is None:
        return f"{what} pays at every turn"
    if turn == 1:
        return f"{what} never pays"
    last = f"; by turn {paid} it has cost more than it saved" if paid else "; it has saved more than it cost"
    return f"{what} stops paying at turn {turn}{last}"


def main(argv: Sequence[str] | None = None, prog: str = "python -m benchmarks.conversations") -> int:
    """Run the command; gives the exit status."""
    return command(prog, lambda: _run(list(sys.argv[1:] if argv is None else argv), prog))


def _run(arguments: list[str], prog: str) -> None:
    parser = bench_parser(prog, "Conversations about one picture, with and without each stage.")
    parser.add_argument("--model", default="decoder-150m", help="demo, decoder-150m or llava-1.5-7b")
    parser.add_argument("--turns", type=int, default=5, help="of each conversation; default: %(default)s")
    parser.add_argument("--system", default="0,512", help="tokens of the system prompt; default: %(default)s")
    parser.add_argument("--concurrency", default="1,4", help="conversations at once; default: %(default)s")
    parser.add_argument("--output", type=int, default=16, help="tokens of an answer; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--block-size", type=int, default=32, help="tokens of a block of the KV cache; default: %(default)s"
    )
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="keep the server's log")
    options = parser.parse_args(arguments)
    talks = [
        Talk(options.turns, system, options.output, concurrency)
        for system in _numbers("--system", options.system)
        for concurrency in _numbers("--concurrency", options.concurrency)
    ]
    if options.rounds < 1 or options.turns < 2 or any(talk.concurrency < 1 for talk in talks):
        raise LoadTestError("--rounds and --concurrency must be at least 1, --turns at least 2.")
    model = model_named(options.model, options.model_dir)
    where = machine.describe()
    print(machine.one_line(where), flush=True)

    def keep(found: list[dict[str, Any]]) -> None:
        """Written after each part, so that an interrupted run keeps what it has."""
        document = {
            "command": shlex.join([*prog.split(), *arguments]),
            "machine": where,
            "load_average_at_end": machine.describe()["load_average"],
            "results": found,
        }
        write_json(options.json, document)

    run(model, talks, options.rounds, options.block_size, options.logs, keep)


def run(
    model: BenchModel,
    talks: Sequence[Talk],
    rounds: int,
    block_size: int,
    logs: Path | None,
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Hold all conversations on one server and print a table each.

    Args:
        model: what is served.
        talks: how conversations go, one after the other.
        rounds: of each.
        block_size: tokens of a block of the KV cache, whole ones of which are dropped where turns go on.
        logs: where the server's log is kept.
        keep: given the results so far, as JSON values, after each.

    Raises:
        LoadTestError: the server did not start, or a request failed.
    """
    spelt = parse_arms(",".join(arm for arm in ARMS if arm not in (FIRST, GOING_ON)))
    own = {arm.label: dict(arm.headers) for arm in spelt}
    headers = {label: asked | _STARTS_OVER for label, asked in own.items()} | {GOING_ON: own[BOTH]}
    found: list[dict[str, Any]] = []

    async def talk_to(url: str) -> None:
        endpoint = Endpoint(url, "/v1/chat/completions", {}, _TIMEOUT_S, verify_tls=False)
        async with ChatClient(endpoint) as client:
            conversations = Conversations(client, model.name, headers)
            for talk in talks:
                held = await measure(conversations, talk, rounds)
                print(report(talk, held), flush=True)
                found.append(_as_json(talk, held))
                keep(found)

    with (
        tempfile.TemporaryDirectory(prefix="vtprune-logs-") as scratch,
        running([_reusing(model, block_size)], model, logs or Path(scratch)) as (server,),
    ):
        asyncio.run(talk_to(server.url))


def _reusing(model: BenchModel, block_size: int) -> ServerSpec:
    spec = pruning_kv(model)
    return replace(spec, flags=(*spec.flags, "--vtprune-kv-reuse", "true", "--block-size", str(block_size)))


def _as_json(talk: Talk, held: Mapping[str, Sequence[Held]]) -> dict[str, Any]:
    waits = {arm: [one.ttft_s for one in rounds] for arm, rounds in held.items()}
    return {
        "turns": talk.turns,
        "system_tokens": talk.system,
        "output_tokens": talk.output,
        "concurrency": talk.concurrency,
        "stage_2_stops_paying_at_turn": stops_paying(waits[BOTH], waits[STAGE_1]),
        "alone_stops_paying_at_turn": stops_paying(waits[STAGE_2], waits["off"]),
        "arms": {
            arm: [{"ttft_s": list(one.ttft_s), "turns_per_s": one.turns_per_s} for one in rounds]
            for arm, rounds in held.items()
        },
    }


def _numbers(flag: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise LoadTestError(f"{flag} takes whole numbers such as 0,512, not {text!r}.")
    return [int(part) for part in parts]


if __name__ == "__main__":
    sys.exit(main())
