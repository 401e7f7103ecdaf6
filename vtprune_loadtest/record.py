# SPDX-License-Identifier: Apache-2.0
"""One request as it was measured, and its line in the JSONL file."""

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

from vtprune_loadtest.questions import FileQuestion, is_right


class Role(StrEnum):
    """Why a request was sent; only `MEASURED` ones enter the statistics."""

    WARMUP = "warmup"
    RAMP = "ramp"
    MEASURED = "measured"


@dataclass(slots=True)
class RequestRecord:
    """Times are seconds of the client's monotonic clock since the run began.

    Attributes:
        intended_s: when the arrival process wanted the request sent; in a closed loop, when its turn came.
        sent_s: just before the request was handed to the connection.
        done_s: when the response was read to its end, or failed.
        token_times_s: when each chunk with output arrived.
        output_tokens: from the usage chunk, else the number of chunks.
        prompt_tokens: from the usage chunk: what the model was given, after pruning.
        vtprune: `usage.vtprune` as the server sent it.
        level: the preset that `auto` was, from the response's header.
        question: the one of the file that was asked; None where answers are not graded.
        reply: the answer's text.
        error_kind: None for a complete answer.
    """

    request_id: str
    setting: str
    role: Role
    load_point: int
    phase: int
    images: int
    repeated_images: int
    max_tokens: int
    intended_s: float
    sent_s: float
    done_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    prompt_tokens: int | None = None
    vtprune: dict[str, Any] | None = None
    level: str | None = None
    question: FileQuestion | None = None
    reply: str = ""
    finish_reason: str | None = None
    error_kind: str | None = None
    error_message: str | None = None

    @property
    def ok(self) -> bool:
        """Whether a complete answer came."""
        return self.error_kind is None

    @property
    def right(self) -> bool | None:
        """Whether the answer is right; None where none came or none is known."""
        if self.question is None or not self.ok:
            return None
        return is_right(self.reply, self.question.answers)

    @property
    def client_queue_s(self) -> float:
        """From the intended arrival to the sending: waiting for a slot under the cap, or a late client."""
        return self.sent_s - self.intended_s

    @property
    def ttft_s(self) -> float:
        """Time to first token, from sending."""
        return self.token_times_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        """End-to-end latency, from sending to the last token (`vllm bench serve` ends there too)."""
        return self.token_times_s[-1] - self.sent_s

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: the gaps between chunks, one fewer than chunks."""
        return [after - before for before, after in pairwise(self.token_times_s)]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for one token, or where all came in one chunk."""
        if self.output_tokens < 2 or len(self.token_times_s) < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1)

    def as_json(self) -> dict[str, Any]:
        """The line of the JSONL file; a field that the server did not report is absent."""
        line: dict[str, Any] = {
            "request_id": self.request_id,
            "setting": self.setting,
            "role": self.role.value,
            "load_point": self.load_point,
            "phase": self.phase,
            "images": self.images,
            "repeated_images": self.repeated_images,
            "max_tokens": self.max_tokens,
            "intended_s": round(self.intended_s, 6),
            "sent_s": round(self.sent_s, 6),
            "done_s": round(self.done_s, 6),
            "client_queue_time_ms": _ms(self.client_queue_s),
        }
        if self.question is not None:
            line |= {"question": self.question.line, "kind": self.question.kind}
        if not self.ok:
            return line | {"error": self.error_kind, "error_message": self.error_message}
        tpot = self.tpot_s
        optional = {
            "tpot_ms": None if tpot is None else _ms(tpot),
            "prompt_tokens": self.prompt_tokens,
            "vtprune": self.vtprune,
            "level": self.level,
            "reply": None if self.question is None else self.reply,
            "right": self.right,
        }
        return (
            line
            | {
                "ttft_ms": _ms(self.ttft_s),
                "e2el_ms": _ms(self.e2el_s),
                "itl_ms": [_ms(gap) for gap in self.itl_s],
                "output_tokens": self.output_tokens,
                "finish_reason": self.finish_reason,
            }
            | {name: value for name, value in optional.items() if value is not None}
        )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
