# SPDX-License-Identifier: Apache-2.0
"""What `vtprune serve` says: its help, the request it prints to try, the words it refuses with."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import threading
from argparse import Namespace
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from vllm_vtprune import demo_model
from vtprune_server import serve
from vtprune_server.options import OperatorSettings, flag
from vtprune_server.ready_hint import Endpoint, announce_when_ready
from vtprune_server.serve_help import VLLM_FLAGS, serve_help


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_shows_our_flags_and_vllms_ten(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main([word]) == 0
    text = capsys.readouterr().out
    assert text == serve_help()
    for name, field in OperatorSettings.model_fields.items():
        assert f"  {flag(name)} " in text
        assert str(field.description) in " ".join(text.split())
    assert len(VLLM_FLAGS) == 10 and all(f"  {name} " in text for name, *_ in VLLM_FLAGS)
    assert "--help=all" in text and "--help=vtprune" in text
    # one default for each flag but --vtprune-config, and for the model
    assert text.count("(default:") == len(OperatorSettings.model_fields) + len(VLLM_FLAGS) + 1


def test_the_ten_are_vllms() -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_vtprune.compat import serve_parser

    make_arg_parser, _ = serve_parser()
    known = make_arg_parser(FlexibleArgumentParser())._option_string_actions
    assert {name for name, *_ in VLLM_FLAGS} <= known.keys()
    told = {name: meaning.rsplit("(default: ", 1)[1].rstrip(")") for name, _, meaning in VLLM_FLAGS}
    for name in ("--port", "--gpu-memory-utilization", "--tensor-parallel-size"):
        assert told[name] == str(known[name].default)


KEY = "a-key"


class _Server(BaseHTTPRequestHandler):
    asked: list[Any]

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        authorised = self.headers["Authorization"] == f"Bearer {KEY}"
        self.asked.append(json.loads(body))
        self.send_response(200 if authorised else 401)
        self.end_headers()
        self.wfile.write(b"answered" if authorised else b"unauthorised")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def https_server(tmp_path: Path) -> Iterator[tuple[int, Path, list[Any]]]:
    """Port, certificate and the bodies it was sent, of a server with a key and a certificate of its own."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=example.org", "-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
        timeout=300,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    handler = type("Handler", (_Server,), {"asked": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, certificate, handler.asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_printed_request_works_with_a_key_and_a_certificate(
    https_server: tuple[int, Path, list[Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    port, certificate, asked = https_server
    args = Namespace(
        host="127.0.0.1",
        port=port,
        uds=None,
        ssl_certfile=str(certificate),
        api_key=[KEY],
        served_model_name=["m"],
    )
    announce_when_ready(args, demo_model.EXAMPLE, demo_model.QUESTION)
    for thread in threading.enumerate():
        if thread.name == "vtprune-hint":
            thread.join(30)
    printed = capfd.readouterr().err
    assert KEY not in printed and "VLLM_API_KEY" in printed
    command = printed[printed.index("curl ") :]
    answer = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, "VLLM_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.stdout == "answered", answer.stderr
    picture = asked[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert picture.startswith("data:image/png;base64,") and len(picture) > 100


@pytest.mark.parametrize(
    "fields,url",
    [
        ({}, "http://localhost:8000"),
        ({"host": "0.0.0.0"}, "http://localhost:8000"),
        ({"host": "::1", "port": 1}, "http://[::1]:1"),
        ({"uds": "/run/a socket"}, "http://localhost"),
    ],
)
def test_where_a_server_is_reached(fields: dict[str, Any], url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    plain = {"host": None, "port": 8000, "uds": None, "ssl_certfile": None, "api_key": None}
    endpoint = Endpoint.of(Namespace(**{**plain, **fields}))
    assert endpoint.url == url and not endpoint.key
    assert ("--unix-socket '/run/a socket'" in endpoint.curl_options) is ("uds" in fields)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert Endpoint.of(Namespace(**{**plain, **fields})).key


@pytest.mark.parametrize("model", ["/no/such/model", "./model", "~/model", "a/b/c"])
def test_a_folder_that_is_not_there_is_said_to_be(model: str) -> None:
    with pytest.raises(OSError, match=f"no folder {model}"):
        serve._check_folder(model)


@pytest.mark.parametrize("model", [None, "name", "owner/name", "/"])
def test_what_may_be_a_model_is_left_to_vllm(model: str | None) -> None:
    serve._check_folder(model)


@pytest.mark.parametrize(("name", "demo"), demo_model.NAMES.items())
def test_a_demo_model_is_served_by_its_name(
    name: str, demo: demo_model.DemoModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {})
    args = Namespace(additional_config=None, max_num_seqs=4)
    serve._use_demo_model(args, [name, "--max-num-seqs", "4"], demo)
    assert args.model == args.model_tag == str(demo.folder) and (demo.folder / "config.json").is_file()
    assert args.served_model_name == [demo.served_name] and args.max_num_seqs == 4
    assert args.additional_config == {"vtprune": {"prune_layer": demo.prune_layer}}
    assert hasattr(args, "limit_mm_per_prompt") is not demo.videos
    assert demo_model.embedded(args.model) is demo


def test_the_project_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert serve._refuse("vtprune: no.") == serve._refuse("no.") == 2
    assert capsys.readouterr().err == "vtprune: no.\n" * 2


def test_without_a_compiler_torch_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disabled(**environment: str) -> str | None:
        monkeypatch.setattr(os, "environ", {"PATH": str(tmp_path), **environment})
        serve.prepare_environment()
        return os.environ.get("TORCHDYNAMO_DISABLE")

    monkeypatch.setattr(serve, "_cpu_build", lambda: True)
    assert disabled() == "1" and disabled(TORCHDYNAMO_DISABLE="0") == "0"
    for name in ("g++", "my-compiler"):
        (tmp_path / name).touch(mode=0o755)
    assert disabled() is disabled(CXX="my-compiler") is None
    assert disabled(CXX="not-there") == "1"
