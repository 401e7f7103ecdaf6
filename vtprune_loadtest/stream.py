# SPDX-License-Identifier: Apache-2.0
"""What a streamed chat completion says: when its tokens came, why it ended, what it cost.

Pure: it is fed (bytes, time of the read) and knows neither HTTP nor the clock.
"""

import json
from typing import Any

from vllm_vtprune.errors import VTPruneError
from vtprune_loadtest.sse import EventParser

_TEXT_FIELDS = ("content", "reasoning", "reasoning_content", "refusal")


class StreamError(VTPruneError):
    """The stream did not bring a complete answer; `kind` is the class it is counted under."""

    def __init__(self, kind: str, message: str) -> None:
        """Remember the kind; the message is for the reader."""
        super().__init__(message)
        self.kind = kind


class ChatStream:
    """One answer as it comes in.

    Attributes:
        token_times: the read time of each chunk that carried output, in the clock's seconds. One chunk is one
            token on most servers at most times; `usage` has the true count.
        text: the answer's so far, without what a model thinks before it.
        finish_reason: the server's, once it has come.
        usage: the usage chunk's object, `vtprune` inside it where the server prunes; None if none came.
    """

    def __init__(self) -> None:
        """Start with nothing read."""
        self.token_times: list[float] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self._parser = EventParser()
        self._finish_time: float | None = None
        self._done = False

    def feed(self, read: bytes, at: float) -> None:
        """Take one network read that arrived at time `at`; chunks that came in one read share its time.

        Raises:
            StreamError: `bad_stream` for data that is no chat completion chunk, `stream_error` for the
                server's error event.
        """
        for event in self._parser.feed(read):
            if event == b"[DONE]":
                self._done = True
            else:
                self._take(event, at)

    def finish(self) -> None:
        """Check that the answer is whole, after the last read.

        Raises:
            StreamError: `truncated` if neither a finish reason nor [DONE] came, `no_tokens` if nothing was
                generated.
        """
        if self.finish_reason is None and not self._done:
            raise StreamError("truncated", "the stream ended without a finish reason")
        if not self.token_times:
            # A server that sends its whole answer as one empty chunk with a finish reason did generate: an
            # end-of-sequence token, at that time.
            if self._finish_time is None or (self.usage or {}).get("completion_tokens") in (None, 0):
                raise StreamError("no_tokens", "the stream brought no output")
            self.token_times.append(self._finish_time)

    def _take(self, event: bytes, at: float) -> None:
        try:
            chunk = json.loads(event)
        except ValueError:
            raise StreamError("bad_stream", f"not JSON: {event[:100]!r}") from None
        if isinstance(chunk, dict) and "error" in chunk:
            raise StreamError("stream_error", error_message(chunk) or "an error event without a message")
        try:
            self._read_chunk(chunk, at)
        except (AttributeError, LookupError, TypeError):
            raise StreamError("bad_stream", f"not a chat completion chunk: {event[:100]!r}") from None

    def _read_chunk(self, chunk: dict[str, Any], at: float) -> None:
        if usage := chunk.get("usage"):
            self.usage = dict(usage)
        if choices := chunk.get("choices"):
            delta = choices[0].get("delta") or {}
            if _carries_output(delta):
                self.token_times.append(at)
            if isinstance(text := delta.get("content"), str):
                self.text += text
            if reason := choices[0].get("finish_reason"):
                self.finish_reason = reason
                self._finish_time = at


def error_message(body: Any) -> str | None:
    """The message of an OpenAI-style `{"error": {"message": ...}}`, None if `body` is something else."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message if isinstance(message, str) else None


def _carries_output(delta: dict[str, Any]) -> bool:
    """Whether a delta stands for output of the model.

    The opening chunk, a role with empty text, does not: some servers send it before the prompt is computed,
    and vLLM sends it together with the first token, which would put a zero among the inter-token latencies.
    An empty text without a role does: vLLM sends one for a token that adds no character yet.
    """
    if delta.get("tool_calls"):
        return True
    texts = [delta[field] for field in _TEXT_FIELDS if isinstance(delta.get(field), str)]
    return bool(texts) and ("role" not in delta or any(texts))
