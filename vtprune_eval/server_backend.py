# SPDX-License-Identifier: Apache-2.0
"""The same questions to a running server, over its OpenAI-compatible API."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import httpx
from PIL import Image

from vllm_vtprune.contract import HEADERS, PRESETS
from vllm_vtprune.settings import VisionSettings
from vtprune_eval.backend import Reply, RunnerError
from vtprune_eval.setting import BASELINES, DOWNSCALE, Setting
from vtprune_eval.tasks import Questions

T = TypeVar("T")
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


class RemoteRunner:
    """Asks a vtprune server; the settings travel as headers, the counts come back in `usage.vtprune`."""

    #: The server draws at random by the picture alone, so there is one draw.
    draws = 1
    layers: int | None = None

    def __init__(
        self,
        url: str,
        questions: Questions,
        *,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        limit: int = 16,
    ) -> None:
        """Look up the model's name.

        Args:
            url: of the server, such as http://localhost:8000.
            questions: what is asked.
            model: served name; the first one listed if None.
            api_key: the server's, if it has one.
            concurrency: requests in flight.
            limit: tokens of an answer at most.

        Raises:
            RunnerError: the server does not answer.
        """
        self.questions, self.concurrency, self.limit = questions, concurrency, limit
        self._url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._images = [_data_url(picture) for picture in questions.pictures]
        self._replies: dict[Setting, list[Reply]] = {}
        self._downscales: bool | None = None
        self.name = model or self._first_model()

    @property
    def baselines(self) -> tuple[str, ...]:
        """All, or all but the smaller picture where the model takes pictures of one size."""
        return BASELINES if self._can_downscale() else tuple(name for name in BASELINES if name != DOWNSCALE)

    def answer(self, setting: Setting) -> list[Reply]:
        """One reply per question, in their order.

        Raises:
            RunnerError: the server refuses the setting, or says nothing of vision tokens; a smaller picture
                has as many tokens as a large one.
        """
        if setting not in self._replies:
            self._replies[setting] = (
                self._answer_smaller(setting)
                if setting.downscales
                else asyncio.run(self._ask_all(self._setting_headers(setting), self._images))
            )
        return self._replies[setting]

    def view_scores(self) -> list[list[list[float]]]:
        """The scores of each picture's views by the server's own score: [pictures][views][units].

        `POST /vtprune/explain` tells them; nothing is generated.

        Raises:
            RunnerError: the server refuses, or is none of ours.
        """

        async def explain(client: httpx.AsyncClient, number: int) -> list[list[float]]:
            response = await self._post(client, "/vtprune/explain", {"image_url": self._images[number]}, {})
            if response.status_code != httpx.codes.OK:
                raise RunnerError(f"{self._url}/vtprune/explain {_refusal(response)}")
            told: Any = response.json()
            return [view["scores"] for view in (told, *told["more_views"])]

        return asyncio.run(self._each(explain, len(self._images)))

    def _answer_smaller(self, setting: Setting) -> list[Reply]:
        """Pictures of the size that should give as many tokens as the setting keeps, and nothing pruned."""
        if not self._can_downscale():
            raise RunnerError(
                f"{self.name} turns a picture of any size into as many vision tokens, so a smaller one saves "
                f"none: compare with --method pool, or leave out {DOWNSCALE}."
            )
        counted = self.answer(Setting(setting.counted))
        images = list(self._images)
        for question, reply in zip(self.questions.asked, counted, strict=True):
            share = reply.vision_tokens_kept / reply.vision_tokens
            images[question.picture] = _data_url(_smaller(self.questions.pictures[question.picture], share))
        whole = Setting(kv=setting.kv)
        replies = asyncio.run(self._ask_all(self._setting_headers(whole), images))
        # the share kept is of the whole picture's tokens
        pairs = zip(replies, counted, strict=True)
        return [replace(reply, vision_tokens=before.vision_tokens) for reply, before in pairs]

    def _can_downscale(self) -> bool:
        """Whether the first picture at half its sides has fewer tokens; asked once."""
        if self._downscales is None:
            half = _data_url(_smaller(self.questions.pictures[0], 0.25))
            replies = [asyncio.run(self._ask_first(image)) for image in (self._images[0], half)]
            self._downscales = replies[1].vision_tokens < replies[0].vision_tokens
        return self._downscales

    async def _ask_first(self, image: str) -> Reply:
        async with httpx.AsyncClient(timeout=_TIMEOUT, headers=self._headers) as client:
            (headers, *_) = self._setting_headers(Setting())
            return await self._ask(client, 0, headers, image)

    def _setting_headers(self, setting: Setting) -> list[dict[str, str]]:
        """Headers of each question's request."""
        if setting.prune_layers or setting.relevance != "attention":
            raise RunnerError(
                "The prune layer, the window and the relevance are the server's: leave them out."
            )
        if setting.vision.score != "cosine":
            raise RunnerError("The score is the server operator's setting: leave out --score.")
        vision = setting.vision
        common = {
            "method": vision.method,
            "kv_keep": ",".join(map(repr, setting.kv.shares)),
            "kv_scope": setting.kv.scope,
        }
        if not setting.kv.gate:
            common["kv_gate"] = "off"
        if not setting.kv.drops:
            # a server without a prune layer takes neither field
            common = {"method": vision.method}
        if setting.like is not None:
            counted = self.answer(Setting(setting.counted))
            # halfway below k of N, so that rounding up gives k whatever the fraction's last digit
            shares = [f"{(r.vision_tokens_kept - 0.5) / r.vision_tokens:.9f}" for r in counted]
            fields = [{**common, "keep_ratio": share} for share in shares]
        elif vision.keep_ratio is not None:
            fields = [{**common, "keep_ratio": f"{vision.keep_ratio!r}"}] * len(self.questions.asked)
        elif vision.max_share < 1:
            # a ceiling is a preset's alone
            preset = next(
                (n for n, p in PRESETS.items() if (p.aggressiveness, p.max_share) == _amount(vision)), None
            )
            if preset is None:
                raise RunnerError("A server takes max_share as part of a preset only: ask for a preset.")
            fields = [{**common, "preset": preset}] * len(self.questions.asked)
        else:
            amount = f"{vision.aggressiveness or 0.0!r}"
            fields = [{**common, "aggressiveness": amount}] * len(self.questions.asked)
        return [{HEADERS[name]: value for name, value in entry.items()} for entry in fields]

    def _first_model(self) -> str:
        try:
            response = httpx.get(f"{self._url}/v1/models", headers=self._headers, timeout=_TIMEOUT)
        except httpx.HTTPError as error:
            raise RunnerError(
                f"{self._url} does not answer ({error!r}): start the server, or name another with --server."
            ) from None
        if response.status_code != httpx.codes.OK:
            raise RunnerError(f"{self._url}/v1/models {_refusal(response)}")
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise RunnerError(
                f"{self._url}/v1/models does not list a model: is it an OpenAI-compatible server?"
            ) from None

    async def _ask_all(self, headers: Sequence[dict[str, str]], images: Sequence[str]) -> list[Reply]:
        async def ask(client: httpx.AsyncClient, number: int) -> Reply:
            image = images[self.questions.asked[number].picture]
            return await self._ask(client, number, headers[number], image)

        return await self._each(ask, len(self.questions.asked))

    async def _each(self, one: Callable[[httpx.AsyncClient, int], Awaitable[T]], count: int) -> list[T]:
        """What `one` gives for each number below `count`, `concurrency` of them in flight."""
        slots = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(timeout=_TIMEOUT, headers=self._headers) as client:

            async def in_turn(number: int) -> T:
                async with slots:
                    return await one(client, number)

            return list(await asyncio.gather(*map(in_turn, range(count))))

    async def _post(
        self, client: httpx.AsyncClient, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> httpx.Response:
        try:
            return await client.post(f"{self._url}{path}", json=body, headers=headers)
        except httpx.HTTPError as error:
            raise RunnerError(f"{self._url} does not answer ({error!r}).") from None

    async def _ask(
        self, client: httpx.AsyncClient, number: int, headers: dict[str, str], image: str
    ) -> Reply:
        question = self.questions.asked[number]
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": question.text},
        ]
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.limit,
            "temperature": 0,
        }
        return _reply(await self._post(client, "/v1/chat/completions", body, headers))


def _reply(response: httpx.Response) -> Reply:
    if response.status_code != httpx.codes.OK:
        raise RunnerError(f"The server {_refusal(response)}")
    answer: Any = response.json()
    counts = answer["usage"].get("vtprune")
    if counts is None:
        raise RunnerError("The server's usage has no vtprune entry: is the plugin loaded in it?")
    first, *above = counts.get("kv_tokens_kept_by_layer") or [counts["kv_tokens_kept"]]
    return Reply(
        (answer["choices"][0]["message"]["content"] or "").strip(),
        counts["vision_tokens"],
        counts["vision_tokens_kept"],
        answer["usage"]["prompt_tokens"],
        first,
        tuple(above),
    )


def _refusal(response: httpx.Response) -> str:
    """What the server said instead of an answer, and of a 401 what to do about it."""
    if response.status_code == httpx.codes.UNAUTHORIZED:
        return "answered 401: give the server's key with --api-key or in $OPENAI_API_KEY."
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text[:200]
    return f"answered {response.status_code}: {message}"


def _amount(vision: VisionSettings) -> tuple[float | None, float]:
    return vision.aggressiveness, vision.max_share


def _smaller(picture: Image.Image, share: float) -> Image.Image:
    """The picture with about this share of its pixels."""
    width, height = (max(1, round(side * share**0.5)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
