# SPDX-License-Identifier: Apache-2.0
"""haproxy and nginx as in deploy/gateways, before two real servers."""

from __future__ import annotations

import json
import re
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from tests.conftest import REPOSITORY, LiveServer
from tests.deploy.contract import only_in_test_deploy
from tests.helpers.client import CHAT, answer, chat_body, metric, post
from tests.helpers.pictures import noise, scene

FILES = REPOSITORY / "deploy" / "gateways"
COMMANDS = {
    "haproxy": ["haproxy", "-db", "-f", "haproxy.cfg"],
    "nginx": ["nginx", "-p", ".", "-c", "nginx.conf", "-g", "daemon off;"],
}

pytestmark = [pytest.mark.engine, only_in_test_deploy]


@pytest.fixture(scope="module")
def servers(live_server: LiveServer, parallel: LiveServer) -> list[LiveServer]:
    """Two, of one engine and of two."""
    return [live_server, parallel]


@contextmanager
def gateway(name: str, folder: Path, servers: list[str]) -> Iterator[str]:
    """The gateway with the shipped configuration, only its addresses changed; its URL."""
    port = free_port()
    addresses = {"127.0.0.1:8080": f"127.0.0.1:{port}"}
    addresses |= {f"127.0.0.1:{8001 + i}": server.removeprefix("http://") for i, server in enumerate(servers)}
    shutil.copytree(FILES, folder, dirs_exist_ok=True)
    (folder / "temp").mkdir(exist_ok=True)
    for file in folder.glob("*.c*f*"):
        text = file.read_text()
        for shipped, ours in addresses.items():
            assert text.count(shipped) == 1
            text = text.replace(shipped, ours)
        file.write_text(text)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(COMMANDS[name], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"{url}/metrics").status_code == 404:  # the gateway's own answer
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        else:
            raise RuntimeError((folder / "log").read_text())
        yield url
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", params=COMMANDS)
def name(request: pytest.FixtureRequest) -> str:
    """The gateway's program."""
    if shutil.which(str(request.param)) is None:
        pytest.skip(f"{request.param} is not installed: apt-get install {request.param}")
    return str(request.param)


@pytest.fixture(scope="module")
def through(name: str, servers: list[LiveServer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway's URL."""
    with gateway(name, tmp_path_factory.mktemp(name), [server.url for server in servers]) as url:
        yield url


def served(servers: list[LiveServer]) -> list[float]:
    return [metric(server.url, "vtprune_requests_total") for server in servers]


def test_both_gateways_let_the_same_routes_through() -> None:
    listed = (FILES / "routes.lst").read_text().split()
    mapped = re.findall(r"^ +(/\S+) 1;$", (FILES / "nginx.conf").read_text(), re.M)
    assert mapped == listed


def test_one_picture_is_always_answered_by_one_server(through: str, servers: list[LiveServer]) -> None:
    used = set()
    for number in range(12):
        before = served(servers)
        for preset in ("off", "balanced", "light"):
            headers = {"X-Session-Id": f"picture-{number}", "X-VTPrune-Preset": preset}
            assert post(through, chat_body(noise(number)), headers).status_code == 200
        grown = [after - old for after, old in zip(served(servers), before, strict=True)]
        assert sorted(grown) == [0, 3]
        used.add(grown.index(3))
    assert used == {0, 1}


def test_a_picture_that_many_ask_about_at_once(name: str, through: str, servers: list[LiveServer]) -> None:
    """HAProxy bounds what one server gets beyond the mean; nginx does not."""
    body, headers = chat_body(noise(100), max_tokens=32, ignore_eos=True), {"X-Session-Id": "everybody's"}
    before = served(servers)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(through, body, headers), range(24)))
    assert [a.status_code for a in answers] == [200] * 24 and len({answer(a) for a in answers}) == 1
    fewest = min(after - old for after, old in zip(served(servers), before, strict=True))
    assert fewest > 0 if name == "haproxy" else fewest == 0


def test_requests_without_a_picture_go_to_both(through: str, servers: list[LiveServer]) -> None:
    before = served(servers)
    for _ in range(24):
        assert post(through, chat_body()).status_code == 200
    assert all(after > old for after, old in zip(served(servers), before, strict=True))


def test_headers_go_both_ways_unchanged(through: str) -> None:
    pruned = post(through, chat_body(scene()), {"X-VTPrune-Preset": "balanced", "X-Request-Id": "mine"})
    assert int(pruned.headers["X-VTPrune-Vision-Tokens-Kept"]) < int(
        pruned.headers["X-VTPrune-Vision-Tokens"]
    )
    assert pruned.headers.get_list("X-Request-Id") == ["mine"]
    repeated = [("X-VTPrune-Preset", "off"), ("X-VTPrune-Preset", "off")]
    assert post(through, chat_body(scene()), repeated).json()["error"]["param"] == "X-VTPrune-Preset"


def test_a_stream_arrives_as_it_is_made(through: str) -> None:
    # short enough to fit a gateway's buffer, so that collected it would come in one piece at the end
    body = chat_body(scene(), stream=True, max_tokens=60, ignore_eos=True)
    post(through, {**body, "stream": False})
    arrived, began = [], time.monotonic()
    with httpx.stream("POST", through + CHAT, json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                arrived.append(time.monotonic() - began)
    assert len(arrived) >= 50
    assert arrived[0] < 0.6 * arrived[-1]


def test_a_large_picture_passes_and_a_body_beyond_the_limit_does_not(through: str) -> None:
    large = noise(1, size=2600)
    assert len(json.dumps(chat_body(large))) > 20 << 20
    assert post(through, chat_body(large)).status_code == 200
    with httpx.Client(timeout=60) as client:
        request = client.build_request("POST", through + CHAT, content=b"x" * (65 << 20))
        try:
            refused = client.send(request)
        except httpx.WriteError:
            pytest.fail("the gateway closed the connection before it answered")
    assert refused.status_code == 413 and refused.json()["error"]["code"] == 413


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/docs",
        "/openapi.json",
        "/playground/",
        "/tokenize",
        "/invocations",
        "/v1/../metrics",
        "/v1/models/x",
        "//metrics",
        "/v1/chat/completions/render",
    ],
)
def test_other_routes_do_not_exist_outside(through: str, path: str) -> None:
    host, port = through.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:  # httpx would tidy the path
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n".encode())
        said = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
    head, _, body = said.partition("\r\n\r\n")
    assert " 404 " in head.splitlines()[0]
    assert json.loads(body[body.index("{") : body.rindex("}") + 1])["error"]["message"].startswith(
        "There is no"
    )


def test_a_server_that_is_down_is_replaced_by_the_other(
    name: str, servers: list[LiveServer], tmp_path: Path
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with gateway(name, tmp_path, [servers[0].url, nobody]) as url:
        answers = [post(url, chat_body(scene()), {"X-Session-Id": str(i)}) for i in range(20)]
    assert [a.status_code for a in answers] == [200] * 20
    assert len({answer(a) for a in answers}) == 1


def test_without_any_server_the_answer_says_when_to_come_back(name: str, tmp_path: Path) -> None:
    with gateway(name, tmp_path, [f"http://127.0.0.1:{free_port()}" for _ in range(2)]) as url:
        refused = post(url, chat_body())
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
    assert refused.json()["error"]["code"] == 503


class Dying(socketserver.BaseRequestHandler):
    """A server that is lost under every chat request: before its answer, or in the middle of a stream."""

    seen: ClassVar[list[bytes]] = []

    def handle(self) -> None:
        """Answer one request of a connection."""
        request = whole(self.request)
        if request.startswith((b"GET", b"OPTIONS")):
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        self.seen.append(request)
        if b'"stream": true' in request or b'"stream":true' in request:
            event = b'data: {"choices": []}\n\n'
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.request.sendall(head + f"{len(event):x}\r\n".encode() + event + b"\r\n")
            time.sleep(0.3)


class Leaving(socketserver.BaseRequestHandler):
    """A server that closes a connection when it has been idle for as long as a real one keeps it, nearly.

    A real one may do so at the moment when the next request comes, and this one always does.
    """

    def handle(self) -> None:
        """Answer a connection's requests."""
        answered = time.monotonic()
        while whole(self.request) and time.monotonic() - answered < 4:
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            answered = time.monotonic()


def whole(connection: socket.socket) -> bytes:
    """A request with its body, which may come in pieces; nothing once the connection is closed."""
    request = b""
    while b"\r\n\r\n" not in request:
        if not (piece := connection.recv(65536)):
            return b""
        request += piece
    head, _, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: *(\d+)", head)
    while length and len(body) < int(length[1]) and (piece := connection.recv(65536)):
        body += piece
    return head + b"\r\n\r\n" + body


@contextmanager
def two(handler: type[socketserver.BaseRequestHandler]) -> Iterator[list[str]]:
    """The URLs of two servers."""
    with ExitStack() as stack:
        urls = []
        for _ in range(2):
            server = stack.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler))
            server.daemon_threads = True  # those that wait for a connection's next request
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            urls.append(f"http://127.0.0.1:{server.server_address[1]}")
        yield urls


def test_a_request_whose_server_is_lost_is_an_error_and_is_not_sent_again(name: str, tmp_path: Path) -> None:
    Dying.seen.clear()
    with two(Dying) as servers, gateway(name, tmp_path, servers) as url:
        lost = post(url, chat_body())
        assert lost.status_code in (502, 503) and int(lost.headers["Retry-After"]) > 0
        assert lost.json()["error"]["code"] == lost.status_code
        assert len(Dying.seen) == 1
        # the end of a chunked body is missing: nobody takes it for a whole one
        with pytest.raises(httpx.RemoteProtocolError):
            post(url, chat_body(stream=True))


def test_a_connection_that_a_server_may_be_about_to_close_is_not_used(name: str, tmp_path: Path) -> None:
    same = {"X-Session-Id": "one server"}
    with two(Leaving) as servers, gateway(name, tmp_path, servers) as url, httpx.Client() as client:
        assert post(url, chat_body(), same, client=client).status_code == 200
        time.sleep(4.5)
        assert post(url, chat_body(), same, client=client).status_code == 200
