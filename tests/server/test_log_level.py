# SPDX-License-Identifier: Apache-2.0
"""Our warnings are said by a server whose root logger vLLM has set to ERROR."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from model_hosting_container_standards.logging_config import configure_root_logger

from vtprune_server.log_level import keep_warnings

OURS = ("vllm_vtprune", "vtprune_server")
#: Loggers that warn while a server starts or serves.
WARNING = ("vllm_vtprune.vision.encoder", "vtprune_server.engine_load")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What reaches a handler of the root logger, once it was set as that package's import sets it."""
    found: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    levels = {name: logging.getLogger(name).level for name in OURS}
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for variable in ("SAGEMAKER_CONTAINER_LOG_LEVEL", "LOG_LEVEL"):
        monkeypatch.delenv(variable, raising=False)
    configure_root_logger()
    monkeypatch.setattr(logging.getLogger(), "handlers", [Lines()])
    for name in OURS:
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield found
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def warn() -> None:
    for name in WARNING:
        logging.getLogger(name).warning("%s warns", name)


def test_warnings_are_said(said: list[str]) -> None:
    warn()
    assert said == []  # otherwise there would be nothing to mend
    keep_warnings()
    warn()
    assert said == [f"{name} warns" for name in WARNING]
    logging.getLogger("another").warning("stays unsaid")
    assert len(said) == len(WARNING)


def test_a_level_of_their_own_stays(said: list[str]) -> None:
    logging.getLogger("vtprune_server").setLevel(logging.ERROR)
    keep_warnings()
    warn()
    assert said == [f"{WARNING[0]} warns"]


def test_where_the_root_logger_says_more_ours_do(said: list[str]) -> None:
    logging.getLogger().setLevel(logging.INFO)
    keep_warnings()
    logging.getLogger(WARNING[0]).info("more")
    assert said == ["more"]


def test_a_server_does_so_when_its_routes_are_attached(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_vtprune.compat import serve_parser

    monkeypatch.setenv("VLLM_PLUGINS", "vtprune")
    make_arg_parser, _ = serve_parser()
    build_app(make_arg_parser(FlexibleArgumentParser()).parse_args([]), ("generate",))
    warn()
    assert said == [f"{name} warns" for name in WARNING]
