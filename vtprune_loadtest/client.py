# SPDX-License-Identifier: Apache-2.0
"""Sends one prepared request over HTTP and fills in its record."""

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx

from vllm_vtprune.contract import LEVEL_HEADER
from vtprune_loadtest.errors import LoadTestError
from vtprune_loadtest.record import RequestRecord
from vtprune_loadtest.stream import ChatStream, StreamError, error_message

# Below the 5 s after which uvicorn closes an idle connection, so that no request is sent into a closing one.
_KEEPALIVE_S = 2.0
_CONNECT_TIMEOUT_S = 30.0
_METADATA_TIMEOUT_S = 10.0
_MAX_ERROR_BYTES = 65536


@dataclass(frozen=True)
class Endpoint:
    """Where requests go. `headers` are sent with every request, the key included."""

    base_url: str
    path: str
    headers: Mapping[str, str]
    timeout_s: float
    verify_tls: bool


class ChatClient:
    """A stack of httpx clients with one connection each.

    httpx's connection pool walks over all its connections for every request: with 128 of them one shared pool
    spends seven times the processor time per chunk that 128 pools of one do, and would be the bottleneck. The
    most recently used connection is taken first, so no more are open than requests were ever in flight.

    Environment proxies are not used: a load test measures the server it names.
    """

    def __init__(self, endpoint: Endpoint, clock: Callable[[], float] = time.perf_counter) -> None:
        """Open nothing yet; `clock` gives seconds."""
        self._endpoint = endpoint
        self._clock = clock
        self._idle: list[httpx.AsyncClient] = []
        self._all: list[httpx.AsyncClient] = []
        self._tls: ssl.SSLContext | bool = ssl.create_default_context() if endpoint.verify_tls else False

    async def __aenter__(self) -> Self:
        """Give the client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close every connection."""
        for client in self._all:
            await client.aclose()

    async def stream_chat(
        self, body: bytes, headers: Mapping[str, str], record: RequestRecord, epoch: float
    ) -> None:
        """Send `body`, read the answer to its end, write times (minus `epoch`), tokens, errors to `record`.

        A failing request ends up in the record and raises nothing; cancellation passes through.
        """
        client = self._idle.pop() if self._idle else self._open()
        stream = ChatStream()
        request = client.build_request(
            "POST",
            self._endpoint.path,
            content=body,
            headers={"Content-Type": "application/json", "X-Request-Id": record.request_id, **headers},
        )
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                record.sent_s = self._clock() - epoch
                response = await client.send(request, stream=True)
                try:
                    if response.status_code != httpx.codes.OK:
                        raise await _http_error(response)
                    record.level = response.headers.get(LEVEL_HEADER)
                    async for read in response.aiter_raw():
                        stream.feed(read, self._clock() - epoch)
                finally:
                    await response.aclose()
            stream.finish()
        except StreamError as error:
            record.error_kind, record.error_message = error.kind, str(error)
        except TimeoutError:
            record.error_kind = "timeout"
            record.error_message = f"no complete answer within {self._endpoint.timeout_s:g} s"
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            record.error_kind, record.error_message = "connect", _describe(error)
        except httpx.HTTPError as error:
            record.error_kind, record.error_message = "disconnected", _describe(error)
        finally:
            self._idle.append(client)
        record.done_s = self._clock() - epoch
        _copy_answer(stream, record)

    async def get_json(self, path: str) -> Any:
        """A JSON document of the server.

        Raises:
            LoadTestError: no answer, or not a 200 with JSON in it.
        """
        text = await self._get(path)
        try:
            return json.loads(text)
        except ValueError:
            raise LoadTestError(
                f"{self._endpoint.base_url}{path} did not answer with JSON: is it OpenAI-compatible?"
            ) from None

    async def get_text(self, path: str) -> str | None:
        """A text document of the server, None if it has none there."""
        try:
            return await self._get(path)
        except LoadTestError:
            return None

    async def complete(
        self, body: bytes, headers: Mapping[str, str]
    ) -> tuple[Mapping[str, str], Mapping[str, Any]] | None:
        """Headers and usage object of one answer that is not streamed; None if the server refuses to give it.

        Raises:
            LoadTestError: no answer, or not JSON.
        """
        client = self._idle.pop() if self._idle else self._open()
        try:
            response = await client.post(
                self._endpoint.path,
                content=body,
                headers={"Content-Type": "application/json", **headers},
                timeout=self._endpoint.timeout_s,
            )
            answer = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise LoadTestError(
                f"{self._endpoint.base_url}{self._endpoint.path} did not answer a chat completion "
                f"({_describe(error)}): is it OpenAI-compatible?"
            ) from None
        finally:
            self._idle.append(client)
        if response.status_code != httpx.codes.OK:
            return None
        usage = answer.get("usage") if isinstance(answer, dict) else None
        return response.headers, usage if isinstance(usage, dict) else {}

    async def _get(self, path: str) -> str:
        client = self._idle.pop() if self._idle else self._open()
        try:
            response = await client.get(path, timeout=_METADATA_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise LoadTestError(
                f"{self._endpoint.base_url} cannot be reached ({_describe(error)}): "
                "start the server, or name another with --base-url."
            ) from None
        finally:
            self._idle.append(client)
        if response.status_code != httpx.codes.OK:
            hint = (
                " Give the server's key with --api-key or in $OPENAI_API_KEY."
                if response.status_code == httpx.codes.UNAUTHORIZED
                else ""
            )
            raise LoadTestError(
                f"{self._endpoint.base_url}{path} answered HTTP {response.status_code}.{hint}"
            )
        return response.text

    def _open(self) -> httpx.AsyncClient:
        client = httpx.AsyncClient(
            base_url=self._endpoint.base_url,
            headers={**self._endpoint.headers, "Accept-Encoding": "identity"},
            limits=httpx.Limits(
                max_connections=1, max_keepalive_connections=1, keepalive_expiry=_KEEPALIVE_S
            ),
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            verify=self._tls,
            trust_env=False,
        )
        self._all.append(client)
        return client


async def _http_error(response: httpx.Response) -> StreamError:
    """The error that a response other than 200 stands for, with the server's own message where it has one."""
    body = b""
    async for read in response.aiter_raw():
        body += read
        if len(body) > _MAX_ERROR_BYTES:
            break
    try:
        message = error_message(json.loads(body))
    except ValueError:
        message = None
    text = message or body[:200].decode("utf-8", "replace").strip() or response.reason_phrase
    return StreamError(f"http_{response.status_code}", text)


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__


def _copy_answer(stream: ChatStream, record: RequestRecord) -> None:
    record.token_times_s = stream.token_times
    record.finish_reason = stream.finish_reason
    record.reply = stream.text if record.question is not None else ""
    usage = stream.usage or {}
    record.output_tokens = usage.get("completion_tokens") or len(stream.token_times)
    record.prompt_tokens = usage.get("prompt_tokens")
    record.vtprune = usage.get("vtprune")
