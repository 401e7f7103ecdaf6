# SPDX-License-Identifier: Apache-2.0
"""Which addresses images are fetched from: a real HTTP server, and names and redirects that lead astray."""

from __future__ import annotations

import base64
import ipaddress
import re
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vllm.exceptions import VLLMClientError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, ImageMediaIO, VideoMediaIO

from tests.helpers.pictures import encoded, scene
from vtprune_server import media
from vtprune_server.media import PrivateAddressError, PublicHTTPConnection, PublicMediaConnector, is_public

PRIVATE = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.168.0.0/16", "192.0.2.0/24", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/128", "::1/128", "fc00::/7", "fe80::/10", "ff00::/8"),
]


@given(st.sampled_from(PRIVATE), st.integers(min_value=0))
def test_nothing_private_is_public_in_any_spelling(network: str, offset: int) -> None:
    inside = ipaddress.ip_network(network)
    address = inside[offset % inside.num_addresses]
    spellings = [str(address)]
    if isinstance(address, ipaddress.IPv4Address):
        number = int(address)
        spellings += [
            f"::ffff:{address}",
            str(ipaddress.IPv6Address((0x64FF9B << 96) | number)),  # NAT64
            str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80))),  # 6to4
            str(ipaddress.IPv6Address(number)),  # IPv4-compatible
        ]
    else:
        spellings.append(f"{address}%eth0")
    assert not any(is_public(spelling) for spelling in spellings)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses_are(address: str) -> None:
    assert is_public(address)


class Site(BaseHTTPRequestHandler):
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        content = encoded(scene())
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A site on all loopback addresses."""
    with ThreadingHTTPServer(("0.0.0.0", 0), Site) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def only_127_0_0_2_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "is_public", lambda address: address == "127.0.0.2")


def fetch(url: str, redirects: bool = False) -> bytes:
    return PublicHTTPConnection().get_bytes(url, timeout=5, allow_redirects=redirects, max_bytes=10**6)


def test_a_public_address_is_fetched(only_127_0_0_2_is_public: None, port: int) -> None:
    assert fetch(f"http://127.0.0.2:{port}/x.png") == encoded(scene())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "127.0.0.3"])
def test_any_other_is_not(only_127_0_0_2_is_public: None, port: int, host: str) -> None:
    with pytest.raises(PrivateAddressError):
        fetch(f"http://{host}:{port}/x.png")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_does_not_get_round_it(only_127_0_0_2_is_public: None, port: int, host: str) -> None:
    Site.seen.clear()
    with pytest.raises(PrivateAddressError):
        fetch(f"http://127.0.0.2:{port}/to/http://{host}:{port}/secret", redirects=True)
    assert "/secret" not in Site.seen


def test_redirects_are_not_followed_at_all_by_default(only_127_0_0_2_is_public: None, port: int) -> None:
    Site.seen.clear()
    assert fetch(f"http://127.0.0.2:{port}/to/http://127.0.0.2:{port}/x.png") == b""
    assert len(Site.seen) == 1


async def to_loopback(self: Any, host: str, port: int = 0, family: int = 0) -> Any:
    address = {"hostname": host, "host": "127.0.0.1", "port": port}
    return [{**address, "family": socket.AF_INET, "proto": 0, "flags": 0}]


def test_a_public_name_that_resolves_to_loopback(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", to_loopback)
    with pytest.raises(PrivateAddressError):
        fetch(f"http://pictures.example.com:{port}/x.png")


def test_an_answer_that_changes_after_the_check(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """DNS rebinding: should the resolver be fooled, the socket is not."""
    monkeypatch.setattr(media._PublicResolver, "resolve", to_loopback)
    with pytest.raises(PrivateAddressError):
        fetch(f"http://pictures.example.com:{port}/x.png")


def test_proxies_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch, only_127_0_0_2_is_public: None, port: int
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    assert fetch(f"http://127.0.0.2:{port}/direct.png") == encoded(scene())


class Broken(ImageMediaIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def load_base64(self, media_type: str, data: str) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        Image.DecompressionBombError("secret"),
        SyntaxError("secret"),
        MemoryError("secret"),
        EOFError("secret"),
        NotImplementedError("secret"),
        RuntimeError("secret"),
        ConnectionError("secret"),
        TimeoutError("secret"),
        KeyError("secret"),
        ValueError("secret"),
    ],
)
async def test_whatever_goes_wrong_the_client_is_told_without_its_text(error: Exception) -> None:
    connector = MEDIA_CONNECTOR_REGISTRY.load("vtprune")
    assert isinstance(connector, PublicMediaConnector)
    url = "data:image/png;base64,AAAA"
    for attempt in (connector.load_from_url_async, connector.load_from_url):
        with pytest.raises(VLLMClientError) as told:
            result = attempt(url, Broken(error))
            await result
        assert "secret" not in str(told.value)


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("data:image/png;base64,AAAA", "in video_url must declare a video type, such as data:video/mp4"),
        ("data:video/mp4;base64,AAAA", "The video could not be decoded: send a whole file such as an MP4"),
        ("data:video/jpeg;base64,AAAA", "The video could not be decoded"),
        ("http://127.0.0.1/film.mp4", "video_url leads to a private"),
        ("file:///etc/passwd", "does not read local files"),
    ],
)
def test_a_videos_errors_speak_of_a_video(url: str, sentence: str) -> None:
    connector = MEDIA_CONNECTOR_REGISTRY.load("vtprune")
    with pytest.raises(VLLMClientError, match=re.escape(sentence)) as told:
        connector.load_from_url(url, VideoMediaIO(ImageMediaIO()))
    assert getattr(told.value, "parameter", "") == "video_url"


def test_a_video_of_pictures_is_decoded() -> None:
    frames = [base64.b64encode(encoded(scene(offset), "JPEG")).decode() for offset in range(3)]
    connector = MEDIA_CONNECTOR_REGISTRY.load("vtprune")
    found = connector.load_from_url(
        "data:video/jpeg;base64," + ",".join(frames), VideoMediaIO(ImageMediaIO())
    )
    pixels, told = found.media
    assert pixels.shape == (3, 168, 168, 3) and told["frames_indices"] == [0, 1, 2]
