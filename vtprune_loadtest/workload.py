# SPDX-License-Identifier: Apache-2.0
"""The requests' contents, encoded before the clock starts.

The k-th request of every setting has the same output length and number of pictures, so settings differ in as
little as possible; pictures and words differ between all requests, so that no cache answers for the server.
"""

import asyncio
import base64
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.images import Picture, PictureSource, PicturesUsedUp, smaller
from vtprune_loadtest.questions import FileQuestion

AHEAD_BYTES = 512 * 2**20  # bodies held in memory; the rest of a longer run is encoded while it goes
_IDLE_S = 0.01
_WORDS = ("amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty")


@dataclass(frozen=True)
class IntRange:
    """Whole numbers from `low` to `high`, both included, drawn evenly."""

    low: int
    high: int

    @classmethod
    def parse(cls, option: str, text: str, minimum: int) -> "IntRange":
        """Read `8` or `4-16`.

        Raises:
            LoadTestError: not of that form, or below `minimum`.
        """
        low, dash, high = text.partition("-")
        try:
            parsed = cls(int(low), int(high if dash else low))
        except ValueError:
            raise LoadTestError(
                f"{option} takes a number like 8 or a range like 4-16, not {text!r}."
            ) from None
        if not minimum <= parsed.low <= parsed.high:
            raise LoadTestError(f"{option} {text}: the range must rise and start at {minimum} or above.")
        return parsed

    def draw(self, rng: np.random.Generator) -> int:
        """One number of the range."""
        return int(rng.integers(self.low, self.high + 1))


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request body, ready to send; `question` is the one that it asks, where answers are graded."""

    body: bytes
    max_tokens: int
    images: int
    repeated_images: int
    question: FileQuestion | None = None


@dataclass(frozen=True)
class WorkloadSpec:
    """What every request looks like.

    Attributes:
        base: top-level fields of the body that all requests share (model, temperature, ...).
        prompt: the text after the pictures.
        prompt_words: random words put before it, distinct by request.
        repeat_share: share of pictures, in [0, 1), that this setting's earlier requests already sent.
    """

    base: dict[str, Any]
    prompt: str
    prompt_words: int
    images_per_prompt: IntRange
    output_len: IntRange
    repeat_share: float
    seed: int


class RequestStream(Protocol):
    """One setting's requests in order."""

    def next_request(self) -> PreparedRequest:
        """The next one, encoded now.

        Raises:
            PicturesUsedUp: the folder holds too few pictures.
        """


def picture_streams(
    spec: WorkloadSpec, pictures: PictureSource, pixels: Sequence[float]
) -> list[RequestStream]:
    """A stream for each setting; `pixels` is each one's share of a picture's pixels."""
    return [_PictureStream(spec, pictures, index, len(pixels), share) for index, share in enumerate(pixels)]


class Workload:
    """Bodies by setting, a queue of ready ones for each.

    Runs on the event loop; only the encoding during a run happens in a thread, one body at a time.
    """

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        """Prepare nothing yet; there is a stream for each setting."""
        self._streams = streams
        self._ready: list[deque[PreparedRequest]] = [deque() for _ in streams]
        self._bytes = 0
        self._encoding = asyncio.Lock()

    async def prepare(self, counts: Sequence[int]) -> None:
        """Have `counts[setting]` bodies of each setting ready, or as many as fit in memory.

        Raises:
            PicturesUsedUp: the folder holds too few pictures.
        """
        while (setting := self._most_wanted(counts)) is not None:
            self._append(setting, self._streams[setting].next_request())
            await asyncio.sleep(0)  # lets an interrupt through

    def has_ready(self, counts: Sequence[int]) -> bool:
        """Whether `counts[setting]` bodies of each setting are ready."""
        return all(len(ready) >= count for ready, count in zip(self._ready, counts, strict=True))

    async def keep_ready(self, counts: Sequence[int]) -> None:
        """Top the queues up to `counts` while requests are sent, until cancelled or out of pictures."""
        while True:
            setting = self._most_wanted(counts)
            if setting is None:
                await asyncio.sleep(_IDLE_S)
                continue
            async with self._encoding:
                try:
                    self._append(setting, await asyncio.to_thread(self._streams[setting].next_request))
                except PicturesUsedUp:
                    return  # take() says so once the queue is empty

    async def take(self, setting: int) -> PreparedRequest:
        """The setting's next body, encoded now if none is ready.

        Raises:
            PicturesUsedUp: the folder holds too few pictures.
        """
        if not self._ready[setting]:
            async with self._encoding:
                if not self._ready[setting]:
                    return await asyncio.to_thread(self._streams[setting].next_request)
        request = self._ready[setting].popleft()
        self._bytes -= len(request.body)
        return request

    def _most_wanted(self, counts: Sequence[int]) -> int | None:
        """The setting that lacks most bodies; None if none lacks any or memory is full."""
        lacking = [count - len(ready) for count, ready in zip(counts, self._ready, strict=True)]
        if self._bytes >= AHEAD_BYTES or max(lacking) <= 0:
            return None
        return lacking.index(max(lacking))

    def _append(self, setting: int, request: PreparedRequest) -> None:
        self._ready[setting].append(request)
        self._bytes += len(request.body)


class _PictureStream:
    """One setting's requests in order; they depend on no other setting, so timing cannot change them."""

    def __init__(
        self, spec: WorkloadSpec, pictures: PictureSource, setting: int, settings: int, pixels: float
    ) -> None:
        self._spec = spec
        self._pixels = pixels
        self._pictures = pictures
        self._setting = setting
        self._settings = settings
        self._lengths = np.random.default_rng([spec.seed, 0])  # the same for every setting
        self._contents = np.random.default_rng([spec.seed, 1, setting])
        self._images = 0  # sent so far, repeats included
        self._fresh: list[int] = []  # picture numbers sent so far, without repeats

    def next_request(self) -> PreparedRequest:
        spec = self._spec
        max_tokens = spec.output_len.draw(self._lengths)
        images = spec.images_per_prompt.draw(self._lengths)
        pictures: list[Picture] = []
        repeated = 0
        for _ in range(images):
            number, is_repeat = self._next_picture()
            repeated += is_repeat
            picture = self._pictures.picture(number)
            if self._pixels < 1:
                picture = smaller(picture, self._pixels)
            pictures.append(picture)
        words = self._contents.choice(_WORDS, spec.prompt_words).tolist()
        body = user_message(spec.base, pictures, " ".join([*words, spec.prompt]), max_tokens)
        return PreparedRequest(body, max_tokens, images, repeated)

    def _next_picture(self) -> tuple[int, bool]:
        """The next picture's number and whether it was sent before.

        Repeats are spread evenly, so their share is exact: the n-th picture is one if floor(n p) grows there.
        """
        share = self._spec.repeat_share
        repeat = int((self._images + 1) * share) > int(self._images * share)
        self._images += 1
        if repeat and self._fresh:
            return int(self._contents.choice(self._fresh)), True
        number = len(self._fresh) * self._settings + self._setting
        self._fresh.append(number)
        return number, False


def user_message(base: dict[str, Any], pictures: Sequence[Picture], text: str, max_tokens: int) -> bytes:
    """The body of a chat of one message: the pictures, then the text."""
    content: list[dict[str, Any]] = []
    for picture in pictures:
        encoded = base64.b64encode(picture.data).decode("ascii")
        content.append(
            {"type": "image_url", "image_url": {"url": f"data:{picture.mime_type};base64,{encoded}"}}
        )
    content.append({"type": "text", "text": text})
    body = base | {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    return json.dumps(body).encode()
