# SPDX-License-Identifier: Apache-2.0
"""Log records of failed requests, with the stack and without the exception's text, which may quote a request.

vLLM logs what nobody foresaw with `logger.exception`: in the API process from its stream generators and
routes, in the engine from the two places named in `_ENGINE`. The frames of a stack hold lines of code and say
where it failed; the text may hold a prompt.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Mapping

#: Set by the server, read in the engine's process, which does not know the server's flags.
WITHHOLD_VARIABLE = "VTPRUNE_WITHHOLD_ERROR_TEXT"

# What vLLM's engine logs of one request and survives, of `StructuredOutputManager` and `EngineCoreProc` (the
# last since 0.33). What ends the engine is logged whole.
_ENGINE = {
    "vllm.v1.structured_output": ("_create_grammar",),
    "vllm.v1.engine.core": ("_handle_request_preproc_error", "_handle_request_validation_error"),
}


def stack_without_text(error: BaseException) -> str:
    """The traceback of an error and of what caused it, each with its type in the place of its text."""
    parts: list[str] = []
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        kind = f"{type(cause).__module__}.{type(cause).__qualname__}".removeprefix("builtins.")
        frames = "".join(traceback.format_tb(cause.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{kind} (--log-error-stack shows its text)")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n\nled to\n\n".join(reversed(parts))


def withhold(record: logging.LogRecord) -> logging.LogRecord:
    """The record, changed in place, with no exception's text in traceback, message or arguments."""
    if record.exc_info and record.exc_info[1] is not None:
        record.exc_text = stack_without_text(record.exc_info[1])
        record.exc_info = None
    record.msg = _type_of_errors(record.msg)
    if isinstance(record.args, Mapping):
        record.args = {name: _type_of_errors(value) for name, value in record.args.items()}
    elif record.args:
        record.args = tuple(_type_of_errors(value) for value in record.args)
    if record.name == "asyncio" and isinstance(record.msg, str):
        # below its first line `BaseEventLoop.default_exception_handler` prints the task, its error included
        record.msg = record.msg.partition("\n")[0]
    return record


def withhold_everywhere() -> None:
    """Withhold the text in each record made in this process from now on: one that serves requests."""
    factory = logging.getLogRecordFactory()
    if getattr(factory, "withholds_error_text", False):
        return

    def withholding(*args: object, **kwargs: object) -> logging.LogRecord:
        return withhold(factory(*args, **kwargs))

    withholding.withholds_error_text = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(withholding)


def withhold_in_engine() -> None:
    """Withhold it in what the engine logs of a single request, where `WITHHOLD_VARIABLE` asks for that."""
    if os.environ.get(WITHHOLD_VARIABLE, "0") == "0":
        return
    for name in _ENGINE:
        logger = logging.getLogger(name)
        if _withhold_for_requests not in logger.filters:
            logger.addFilter(_withhold_for_requests)


def _withhold_for_requests(record: logging.LogRecord) -> bool:
    if record.funcName in _ENGINE.get(record.name, ()):
        withhold(record)
    return True


def _type_of_errors(value: object) -> object:
    return type(value).__name__ if isinstance(value, BaseException) else value
