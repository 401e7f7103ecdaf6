# SPDX-License-Identifier: Apache-2.0
"""What vLLM's own classes do with what we give them: each order that we assume, without an engine."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Response
from vllm.connections import HTTPConnection
from vllm.entrypoints.openai.chat_completion import api_router as chat
from vllm.entrypoints.openai.completion import api_router as completions
from vllm.v1.engine import core
from vllm.v1.structured_output import __file__ as structured_output

from vllm_vtprune.compat import serve_parser
from vllm_vtprune.error_text import _ENGINE
from vtprune_server.media import PublicHTTPConnection
from vtprune_server.responses import annotate
from vtprune_server.routes import attach_prompt_routes


class Noted:
    """A request's record that notes what it is told."""

    def __init__(self) -> None:
        self.statuses: list[int | None] = []

    def answered(self, status: int | None, **_: Any) -> None:
        self.statuses.append(status)


@pytest.mark.parametrize("response", [None, Response()], ids=["0.32", "0.33"])
def test_a_client_that_left_was_not_answered(response: Response | None) -> None:
    record = Noted()
    assert annotate(response, None, record) is None  # type: ignore[arg-type]
    assert record.statuses == [None]


def test_the_answers_schemas_are_vllms_own() -> None:
    app = FastAPI()
    for router in (chat, completions):
        router.attach_router(app)
    before = app.openapi()["paths"]
    app.openapi_schema = None
    attach_prompt_routes(app)
    after = app.openapi()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert after[path]["post"]["responses"] == before[path]["post"]["responses"]
        names = {parameter["name"].lower() for parameter in after[path]["post"]["parameters"]}
        assert "x-vtprune-preset" in names


def test_every_engine_log_line_that_may_quote_a_request_is_known() -> None:
    """Those that say an error's text, less those after which the engine ends or that name no request."""
    found = {
        "vllm.v1.engine.core": lines_with_an_error(Path(core.__file__)),
        "vllm.v1.structured_output": lines_with_an_error(Path(structured_output)),
    }
    for module, functions in found.items():
        assert functions - _OF_THE_ENGINE <= set(_ENGINE[module]), "read the new ones, then name them"
    assert "_handle_request_preproc_error" in found["vllm.v1.engine.core"]


#: Log lines about the engine itself: start, end, calls that are no requests, and the ids of lost images.
_OF_THE_ENGINE = {
    "run_engine_core",
    "run",
    "_handle_mm_cache_miss",
    "_invoke_utility_method",
    "process_output_sockets",
    "startup_handshake",
    "reload_weights",
}


def lines_with_an_error(file: Path) -> set[str]:
    """Functions that log an exception: with its stack, or by a name that exceptions go by."""
    found: set[str] = set()

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger."):
            names = {n.id for a in node.args[1:] for n in ast.walk(a) if isinstance(n, ast.Name)}
            if ast.unparse(node.func) == "logger.exception" or names & {"e", "err", "error", "exc"}:
                found.add(function)
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(ast.parse(file.read_text()), "")
    return found


@pytest.mark.parametrize("name", ["get_bytes", "async_get_bytes", "get_async_client"])
def test_our_connection_takes_what_vllm_gives(name: str) -> None:
    theirs = inspect.signature(getattr(HTTPConnection, name))
    given = {p.name: None for p in theirs.parameters.values() if p.kind is p.KEYWORD_ONLY}
    places = [None for p in theirs.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    inspect.signature(getattr(PublicHTTPConnection, name)).bind(*places, **given)


def test_the_parser_is_where_this_release_keeps_it() -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    make_arg_parser, cli_env_setup = serve_parser()
    assert make_arg_parser(FlexibleArgumentParser()).parse_args([]).port == 8000
    assert callable(cli_env_setup)
