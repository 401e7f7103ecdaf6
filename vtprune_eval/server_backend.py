# SPDX-License-Identifier: Apache-2.0
"""The same questions to a running server, over its OpenAI-compatible API."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Sequence
from typing import Any

import httpx

from vllm_vtprune.settings import HEADERS
from vtprune_eval.backend import Reply, RunnerError
from vtprune_eval.setting import Setting
from vtprune_eval.tasks import Questions

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
        self.name = model or self._first_model()

    def answer(self, setting: Setting) -> list[Reply]:
        """One reply per question, in their order.

        Raises:
            RunnerError: the server refuses the setting, or says nothing of vision tokens.
        """
        if setting not in self._replies:
            headers = self._setting_headers(setting)
            self._replies[setting] = asyncio.run(self._ask_all(headers))
        return self._replies[setting]

    def _setting_headers(self, setting: Setting) -> list[dict[str, str]]:
        """Headers of each question's request."""
        if setting.prune_layer is not None or setting.relevance != "attention":
            raise RunnerError(
                "The prune layer, the window and the relevance are the server's: leave them out."
            )
        if setting.vision.score != "cosine":
            raise RunnerError("The score is the server operator's setting: leave out --score.")
        vision = setting.vision
        common = {"method": vision.method, "kv_keep": f"{setting.kv.keep!r}", "kv_scope": setting.kv.scope}
        if not setting.kv.drops:
            # a server without a prune layer takes neither field
            common = {"method": vision.method}
        if setting.like is not None:
            counted = self.answer(Setting(setting.like))
            # halfway below k of N, so that rounding up gives k whatever the fraction's last digit
            shares = [f"{(r.vision_tokens_kept - 0.5) / r.vision_tokens:.9f}" for r in counted]
            fields = [{**common, "keep_ratio": share} for share in shares]
        elif vision.keep_ratio is not None:
            fields = [{**common, "keep_ratio": f"{vision.keep_ratio!r}"}] * len(self.questions.asked)
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

    async def _ask_all(self, headers: Sequence[dict[str, str]]) -> list[Reply]:
        slots = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(timeout=_TIMEOUT, headers=self._headers) as client:

            async def one(number: int) -> Reply:
                async with slots:
                    return await self._ask(client, number, headers[number])

            return list(await asyncio.gather(*map(one, range(len(self.questions.asked)))))

    async def _ask(self, client: httpx.AsyncClient, number: int, headers: dict[str, str]) -> Reply:
        question = self.questions.asked[number]
        content = [
            {"type": "image_url", "image_url": {"url": self._images[question.picture]}},
            {"type": "text", "text": question.text},
        ]
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.limit,
            "temperature": 0,
        }
        try:
            response = await client.post(f"{self._url}/v1/chat/completions", json=body, headers=headers)
        except httpx.HTTPError as error:
            raise RunnerError(f"{self._url} does not answer ({error!r}).") from None
        return _reply(response)


def _reply(response: httpx.Response) -> Reply:
    if response.status_code != httpx.codes.OK:
        raise RunnerError(f"The server {_refusal(response)}")
    answer: Any = response.json()
    counts = answer["usage"].get("vtprune")
    if counts is None:
        raise RunnerError("The server's usage has no vtprune entry: is the plugin loaded in it?")
    return Reply(
        (answer["choices"][0]["message"]["content"] or "").strip(),
        counts["vision_tokens"],
        counts["vision_tokens_kept"],
        answer["usage"]["prompt_tokens"],
        counts["kv_tokens_kept"],
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


def _data_url(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
