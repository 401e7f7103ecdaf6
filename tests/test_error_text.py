# SPDX-License-Identifier: Apache-2.0
"""What is logged of an error: where it happened and its type, not what it says."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.structured_output import StructuredOutputManager

from vllm_vtprune.error_text import (
    WITHHOLD_VARIABLE,
    stack_without_text,
    withhold_everywhere,
    withhold_in_engine,
)

logger = logging.getLogger("tests.error_text")


def logged(name: str, log: Callable[[], object]) -> str:
    """What a logger writes with the standard library's formatter."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    target = logging.getLogger(name)
    target.addHandler(handler)
    try:
        log()
    finally:
        target.removeHandler(handler)
    return written.getvalue()


def fail_in_two_steps() -> None:
    try:
        raise KeyError("secret one")
    except KeyError as error:
        raise ValueError("secret two") from error


def log_failure() -> None:
    try:
        fail_in_two_steps()
    except ValueError:
        logger.exception("While answering %s", "req-1")


@pytest.mark.usefixtures("withheld")
def test_the_stack_is_logged_without_the_text() -> None:
    text = logged(logger.name, log_failure)
    assert "While answering req-1" in text
    assert text.index("KeyError") < text.index("ValueError"), "the cause comes first"
    assert "in fail_in_two_steps" in text
    # the lines of code above are part of a stack; what they raised is not
    assert "secret" not in text.replace('KeyError("secret one")', "").replace('ValueError("secret two")', "")


@pytest.mark.usefixtures("withheld")
def test_asking_for_it_again_changes_nothing() -> None:
    factory = logging.getLogRecordFactory()
    withhold_everywhere()  # vLLM may initialise a plugin again
    assert logging.getLogRecordFactory() is factory


def test_without_it_the_text_is_there() -> None:
    assert "ValueError: secret two" in logged(logger.name, log_failure)


@pytest.mark.usefixtures("withheld")
@pytest.mark.parametrize(
    "log",
    [
        lambda: logger.error(ValueError("secret")),
        lambda: logger.error("failed: %s", ValueError("secret")),
        lambda: logger.error("failed: %r after %d", ValueError("secret"), 3),
        lambda: logger.error("failed: %(error)s", {"error": ValueError("secret")}),
        lambda: logger.error("ValueError", exc_info=ValueError("secret")),
    ],
)
def test_errors_in_messages_and_arguments_are_their_types(log: Callable[[], object]) -> None:
    text = logged(logger.name, log)
    assert "ValueError" in text
    assert "secret" not in text


@pytest.mark.usefixtures("withheld")
def test_other_records_are_as_they_were() -> None:
    assert logged(logger.name, lambda: logger.error("a %s of %d\nlines", "b", 2)) == "a b of 2\nlines\n"
    assert (
        logged(logger.name, lambda: logger.error("no error", exc_info=True)) == "no error\nNoneType: None\n"
    )


@pytest.mark.usefixtures("withheld")
def test_a_task_nobody_waited_for() -> None:
    async def fail() -> None:
        raise ValueError("".join(["sec", "ret"]))

    async def forget() -> None:
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task

    text = logged("asyncio", lambda: asyncio.run(forget()))
    assert text.startswith("Task exception was never retrieved\n")
    assert "in fail" in text and "ValueError" in text
    assert "secret" not in text


def test_errors_that_cause_each_other_end() -> None:
    one, two = ValueError("1"), KeyError("2")
    one.__cause__, two.__cause__ = two, one
    assert stack_without_text(one).count("Traceback") == 2


def compile_bad_grammar() -> None:
    def compile_grammar(*_: Any, **__: Any) -> None:
        raise ValueError("".join(["sec", "ret"]))

    manager = StructuredOutputManager.__new__(StructuredOutputManager)
    manager.backend = SimpleNamespace(compile_grammar=compile_grammar)  # type: ignore[assignment]
    request = SimpleNamespace(
        request_id="req-1",
        sampling_params=None,
        structured_output_request=SimpleNamespace(structured_output_key=("regex", "x")),
    )
    with pytest.raises(ValueError, match="secret"):
        manager._create_grammar(request)  # type: ignore[arg-type]


def take_bad_request() -> None:
    engine = SimpleNamespace(_send_error_outputs_to_client=lambda *_: None)
    request = SimpleNamespace(request_id="req-1", client_index=0)
    try:
        raise ValueError("".join(["sec", "ret"]))
    except ValueError:
        EngineCoreProc._handle_request_preproc_error(engine, request)  # type: ignore[arg-type]


ENGINE = [
    ("vllm.v1.structured_output", compile_bad_grammar),
    ("vllm.v1.engine.core", take_bad_request),
]


@pytest.mark.parametrize("withheld_there", [True, False])
@pytest.mark.parametrize("name,log", ENGINE)
def test_the_engine_withholds_it_where_the_server_asks(
    name: str, log: Callable[[], None], withheld_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(name), "filters", [])
    monkeypatch.setenv(WITHHOLD_VARIABLE, "1" if withheld_there else "0")
    withhold_in_engine()
    text = logged(name, log)
    assert "req-1" in text and "ValueError" in text
    assert ("secret" not in text) is withheld_there


def test_what_ends_the_engine_is_logged_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vllm.v1.engine.core"
    monkeypatch.setattr(logging.getLogger(name), "filters", [])
    monkeypatch.setenv(WITHHOLD_VARIABLE, "1")
    withhold_in_engine()
    fatal = logging.getLogger(name)
    assert "ValueError: why" in logged(name, lambda: fatal.error("Fatal.", exc_info=ValueError("why")))
