# SPDX-License-Identifier: Apache-2.0
"""Which errors were written for a client to read.

vLLM answers 400 to every `ValueError`, `TypeError` and `OverflowError`, with the error's text, and a stream
ends with the text of any error at all (`vllm.entrypoints.serve.exception_handling.error_response`). Some of
them are sentences that vLLM raises about the request; others come out of a library that it called and tell of
the server's inside.
"""

from __future__ import annotations

import functools
import linecache
import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

import pydantic
from jinja2 import TemplateError
from vllm.entrypoints.anthropic import serving as anthropic_serving
from vllm.exceptions import VLLMError, VLLMServerError, VLLMValidationError

logger = logging.getLogger(__name__)

_OURS = ("vllm", "vllm_vtprune", "vtprune_server")
# What vLLM answers 400, or 501, with the text (`init_exception_handler`).
_ANSWERED = (ValueError, TypeError, OverflowError, NotImplementedError)
_WRITTEN_FOR_CLIENTS = (VLLMError, pydantic.ValidationError, TemplateError)
_FORESEEN = _ANSWERED + _WRITTEN_FOR_CLIENTS
GENERIC_ERROR = "The server failed to answer this request; its log names the error."
GENERIC_REFUSAL = (
    "The request could not be processed as it is; the server's log names the error by the request's id."
)


def disclosable(error: BaseException) -> BaseException:
    """The error to answer with: itself where its text was written for a client, else one that tells nothing.

    Written for clients are vLLM's own error types, what pydantic and a chat template say of the request, and
    what a `raise` statement in vLLM's code or ours says; not what a library raises, or the interpreter.
    """
    if not isinstance(error, _ANSWERED) or isinstance(error, _WRITTEN_FOR_CLIENTS):
        return error
    return error if _raised_on_purpose(error.__traceback__) else VLLMValidationError(GENERIC_REFUSAL)


def disclose_in_streams(handlers: Any) -> None:
    """Have what serving handlers write into a stream that fails pass through `disclosable`.

    Hooks: `vllm.entrypoints.generate.base.serving.GenerateBaseServing.create_streaming_error_response`, and
    `vllm.entrypoints.serve.engine.serving.BaseServing.create_error_response`, with which 0.33's chat streams
    (`OpenAIServingChat.chat_completion_stream_generator`) make their errors.

    Args:
        handlers: vLLM's serving handlers; what has no such method is passed over.
    """
    for handler in handlers:
        if not hasattr(handler, "create_streaming_error_response"):
            continue
        for name in ("create_streaming_error_response", "create_error_response"):
            setattr(handler, name, _disclosing(getattr(handler, name)))


def disclose_in_messages(handler: Any) -> None:
    """Have the messages API's errors pass through `disclosable`; the unforeseen is a 500 without text.

    Hooks: `vllm.entrypoints.anthropic.api_router`, which logs and answers the text of whatever
    `AnthropicServingMessages.create_messages` and `.count_tokens` raise, before an exception handler sees it;
    and `sanitize_message`, through which alone `AnthropicServingMessages.message_stream_converter` writes an
    error's text into a stream.
    """
    anthropic_serving.sanitize_message = lambda message: GENERIC_ERROR
    for name in ("create_messages", "count_tokens"):
        setattr(handler, name, _disclosing_errors(getattr(handler, name), name))


def _disclosing_errors(method: Callable[..., Awaitable[Any]], name: str) -> Callable[..., Awaitable[Any]]:
    @functools.wraps(method)
    async def telling(*args: Any, **kwargs: Any) -> Any:
        try:
            return await method(*args, **kwargs)
        except Exception as error:
            answered = _disclosable_or_failed(error)
            if not isinstance(error, _FORESEEN):
                logger.exception("vtprune: error in %s", name)
            if answered is error:
                raise
            raise answered from None

    return telling


def _disclosable_or_failed(error: BaseException) -> BaseException:
    """`disclosable`; the unforeseen is a 500 that says no more. For what no `QuietErrors` is around."""
    return disclosable(error) if isinstance(error, _FORESEEN) else VLLMServerError(GENERIC_ERROR)


def _disclosing(write: Any) -> Any:
    def write_disclosable(message: Any, *args: Any, **kwargs: Any) -> Any:
        said = _disclosable_or_failed(message) if isinstance(message, Exception) else message
        return write(said, *args, **kwargs)

    return write_disclosable


def _raised_on_purpose(traceback: TracebackType | None) -> bool:
    """Whether the innermost line is a `raise` statement of vLLM or of this project."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    package = frame.f_globals.get("__name__", "").partition(".")[0]
    line = linecache.getline(frame.f_code.co_filename, traceback.tb_lineno)
    return package in _OURS and line.lstrip().startswith("raise ")
