# SPDX-License-Identifier: Apache-2.0
"""Closed-loop load in the background, every answer compared, every failure named."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.helpers.client import CHAT, chat_body
from tests.helpers.pictures import scene

PICTURES = [scene(offset) for offset in range(40)]
PRESETS = ("off", "balanced")


@dataclass
class Report:
    """What clients saw.

    Attributes:
        right: answers equal to the first one for the same picture and preset.
        wrong: the others.
        failed: seconds since the start and kind of each request that was not answered.
        unsent: requests whose connection was refused, so that another address was tried.
    """

    right: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: list[tuple[float, str]] = field(default_factory=list)
    unsent: int = 0

    @property
    def kinds(self) -> Counter[str]:
        """How many failed, by kind."""
        return Counter(kind for _, kind in self.failed)

    @property
    def spell(self) -> float:
        """Seconds from the first failure to the last."""
        times = [at for at, _ in self.failed]
        return max(times) - min(times) if times else 0.0

    def row(self, name: str) -> str:
        """A line of the table in deploy/ray/README.md."""
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.kinds.items())) or "nothing"
        total = self.right + len(self.wrong) + len(self.failed)
        return (
            f"| {name} | {len(self.failed)} of {total} | {kinds} | {self.spell:.1f} s | {len(self.wrong)} |"
        )


class Load:
    """Clients that send one request after the other.

    Args:
        urls: where to; a client begins at one of them and goes to the next when refused a connection.
        clients: how many at once.

    Attributes:
        report: what they have seen so far.
        pause: seconds that each waits before its next request.
    """

    def __init__(self, urls: Sequence[str], clients: int = 8) -> None:
        self.urls = urls
        self.report = Report()
        self.pause = 0.0
        self._truth: dict[tuple[int, str], str] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]

    def _client(self, number: int) -> None:
        chosen, place, sent = random.Random(number), number, 0
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self._stop.is_set():
                if self.pause and self._stop.wait(self.pause):
                    break
                picture, preset = chosen.randrange(len(PICTURES)), chosen.choice(PRESETS)
                sent += 1
                try:
                    text = ask(client, self.urls[place % len(self.urls)], picture, preset, sent % 2 == 0)
                except httpx.ConnectError:
                    place += 1
                    with self._lock:
                        self.report.unsent += 1
                    time.sleep(0.05)
                except Lost as lost:
                    with self._lock:
                        self.report.failed.append((time.monotonic() - self._began, str(lost)))
                else:
                    with self._lock:
                        if self._truth.setdefault((picture, preset), text) == text:
                            self.report.right += 1
                        else:
                            self.report.wrong.append(text)

    @contextmanager
    def running(self) -> Iterator[Report]:
        """Load while the block runs."""
        for thread in self._threads:
            thread.start()
        try:
            yield self.report
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()


class Lost(Exception):
    """A request that was sent and not answered; the message is the kind of failure."""


def ask(client: httpx.Client, url: str, picture: int, preset: str, stream: bool) -> str:
    """The answer's text.

    Raises:
        Lost: no answer, or an error.
        httpx.ConnectError: nothing was sent.
    """
    body = chat_body(PICTURES[picture], stream=stream)
    try:
        with client.stream("POST", url + CHAT, json=body, headers={"X-VTPrune-Preset": preset}) as response:
            if response.status_code != 200:
                response.read()
                raise Lost(_refusal(response))
            if stream:
                return _streamed(response)
            response.read()
            return str(response.json()["choices"][0]["message"]["content"])
    except httpx.ConnectError:
        raise
    except httpx.HTTPError as error:
        raise Lost(f"connection broken{' in a stream' if stream else ''} ({type(error).__name__})") from error


def _streamed(response: httpx.Response) -> str:
    text, done = "", False
    for line in response.iter_lines():
        done = done or line == "data: [DONE]"
        if line.startswith("data: {"):
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise Lost("error event in a stream")
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    if not done:
        raise Lost("stream without its end")
    return text


def _refusal(response: httpx.Response) -> str:
    kind = response.headers.get("content-type", "").partition(";")[0]
    later = " with Retry-After" if "retry-after" in response.headers else ""
    try:
        response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {kind} that is no error document{later}"
    return f"{response.status_code} JSON{later}"
