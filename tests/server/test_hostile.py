# SPDX-License-Identifier: Apache-2.0
"""Input from people who mean harm. After each the server is healthy and answers as it did before."""

from __future__ import annotations

import base64
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.conftest import MODEL_NAME, LiveServer
from tests.helpers.client import CHAT, chat_body, post, told
from tests.helpers.pictures import data_url, encoded, noise, scene

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def as_before(live_server: LiveServer) -> Any:
    return told(post(live_server.url, chat_body(scene(), vtprune={"preset": "balanced"})))


@pytest.fixture(autouse=True)
def unharmed(live_server: LiveServer, as_before: Any) -> Iterator[None]:
    yield
    assert live_server.healthy()
    assert told(post(live_server.url, chat_body(scene(), vtprune={"preset": "balanced"}))) == as_before


def ask(server: str, image: Image.Image | str | bytes, **fields: Any) -> httpx.Response:
    url = image if isinstance(image, str) else data_url(image)
    return post(server, chat_body(url, **fields))


def refused(response: httpx.Response, *statuses: int) -> str:
    """The sentence of an answer that blames the client."""
    assert response.status_code in (statuses or (400, 422)), (response.status_code, response.text[:500])
    return str(response.json()["error"]["message"])


# --- where an image_url may lead ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/health",
        "http://localhost:{port}/health",
        "http://LOCALHOST.:{port}/health",
        "http://ip6-localhost:{port}/health",
        "http://[::1]:{port}/health",
        "http://[::ffff:127.0.0.1]:{port}/health",
        "http://[::ffff:7f00:1]:{port}/health",
        "http://[64:ff9b::7f00:1]/",
        "http://0.0.0.0:{port}/health",
        "http://0x7f.0.0.1:{port}/health",
        "http://0177.0.0.1:{port}/health",
        "http://2130706433:{port}/health",
        "http://127.1:{port}/health",
        "http://user:secret@127.0.0.1:{port}/health",
        "http://example.com@127.0.0.1:{port}/health",
        "http://169.254.169.254/latest/meta-data/",
        "http://[fd00:ec2::254]/latest/meta-data/",
        "http://10.0.0.1/",
        "http://192.168.0.1/",
        "http://100.64.0.1/",
        "https://127.0.0.1:{port}/health",
    ],
)
def test_no_private_address_is_fetched(live_server: LiveServer, url: str) -> None:
    sentence = refused(ask(live_server.url, url.format(port=httpx.URL(live_server.url).port)))
    assert "image_url" in sentence
    # nothing of the server's own answer, and no word on whether the port was open
    assert "non-public" in sentence or "Invalid URL" in sentence or "could not be fetched" in sentence


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "gopher://127.0.0.1/",
        "ftp://127.0.0.1/x.png",
        "http://",
        "http://nowhere.invalid/x.png",
        "data:image/png;base64,@@@@",
        "data:image/png,plain",
        "data:",
        "/etc/passwd",
        "\x00",
    ],
)
def test_what_is_no_fetchable_url_is_refused(server: str, url: str) -> None:
    assert "root:" not in refused(ask(server, url))


# --- pictures ----------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in 130 kB."""
    return encoded(Image.new("1", (30_000, 30_000)))


def lying_png() -> bytes:
    """A PNG whose header claims 2^31 - 1 pixels a side and whose data holds almost nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


BROKEN: dict[str, Callable[[], bytes]] = {
    "decompression bomb": bomb,
    "a header that lies": lying_png,
    "truncated PNG": lambda: encoded(scene())[:300],
    "truncated JPEG": lambda: encoded(scene(), "JPEG")[:300],
    "PNG signature, then HTML": lambda: b"\x89PNG\r\n\x1a\n<html><script>alert(1)</script>",
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PDF": lambda: b"%PDF-1.4\n1 0 obj<<>>endobj",
    "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(id) run\n",
    "nothing": lambda: b"",
    "zeros": lambda: bytes(4096),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_pictures_are_refused(server: str, name: str) -> None:
    sentence = refused(ask(server, "data:image/png;base64," + base64.b64encode(BROKEN[name]()).decode()))
    assert "Traceback" not in sentence and "<" not in sentence and "0x" not in sentence


def animated() -> bytes:
    frames = [scene(offset) for offset in (0, 40, 80)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    buffer = io.BytesIO()
    scene().crop((0, 0, 168, 100)).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def png_and_zip() -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x.html", "<script>alert(1)</script>")
    return encoded(scene()) + archive.getvalue()


ODD: dict[str, Callable[[], bytes]] = {
    "1x1": lambda: encoded(Image.new("RGB", (1, 1), "red")),
    "1x10000": lambda: encoded(Image.new("RGB", (1, 10_000), "red")),
    "10000x1": lambda: encoded(Image.new("RGB", (10_000, 1), "red")),
    "30 megapixels": lambda: encoded(Image.new("RGB", (6000, 5000), "red"), "JPEG"),
    "CMYK": lambda: encoded(scene().convert("CMYK"), "JPEG"),
    "16 bit": lambda: encoded(Image.fromarray(np.arange(10_000, dtype=np.uint16).reshape(100, 100))),
    "palette": lambda: encoded(scene().convert("P")),
    "grey with alpha": lambda: encoded(scene().convert("LA")),
    "RGBA": lambda: encoded(scene().convert("RGBA")),
    "one bit": lambda: encoded(scene().convert("1")),
    "turned by EXIF": sideways,
    "animated GIF": animated,
    "WebP": lambda: encoded(scene(), "WEBP"),
    "PNG and ZIP in one": png_and_zip,
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_served(server: str, name: str) -> None:
    response = ask(server, ODD[name](), vtprune={"keep_ratio": 0.25})
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["vtprune"]["vision_tokens_kept"] == 36


def test_a_picture_that_claims_to_be_another(server: str) -> None:
    """A forged id must not be answered with the picture somebody else sent under it."""

    def chat(image: Image.Image | None, question: str, name: str) -> httpx.Response:
        url = None if image is None else {"url": data_url(image)}
        part = {"type": "image_url", "image_url": url, "uuid": name}
        message = {"role": "user", "content": [part, {"type": "text", "text": question}]}
        return post(server, {"model": MODEL_NAME, "max_tokens": 1, "temperature": 0, "logprobs": True,
                             "top_logprobs": 5, "messages": [message]})  # fmt: skip

    def words(response: httpx.Response) -> Any:
        return response.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]

    mine = Image.new("RGB", (168, 168), "yellow")
    alone = words(chat(mine, "what color is the circle ?", "mine"))
    victim = words(chat(scene(), "what color is the circle ?", "theirs"))
    assert victim != alone
    assert words(chat(mine, "what color is the circle ?", "theirs")) == alone
    refused(chat(None, "what color is the circle ?", "theirs"))


def test_a_picture_with_a_forged_exif_id(server: str) -> None:
    def with_id(image: Image.Image) -> str:
        exif = Image.Exif()
        exif[0xA420] = "11111111111111111111111111111111"  # ImageID; vLLM takes a UUID here for the cache key
        buffer = io.BytesIO()
        image.save(buffer, "PNG", exif=exif)
        return data_url(buffer.getvalue())

    settings = {"aggressiveness": 0.5}
    mine = Image.new("RGB", (168, 168), "yellow")
    alone = told(ask(server, mine, vtprune=settings))
    theirs = told(ask(server, with_id(scene()), vtprune=settings))
    assert theirs != alone
    assert told(ask(server, with_id(mine), vtprune=settings)) == alone


# --- size and shape of the request -------------------------------------------------------------------------


def test_too_many_pictures(server: str) -> None:
    assert "16" in refused(post(server, chat_body(*[scene().resize((8, 8))] * 100)))


def test_a_body_of_200_megabytes(server: str) -> None:
    assert "64 MiB" in refused(post(server, chat_body("data:image/png;base64," + "A" * 200_000_000)), 413)


def test_a_body_that_never_says_its_size(server: str) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(80):
            yield b" " * 2**20

    headers = {"content-type": "application/json"}
    refused(httpx.post(server + CHAT, content=chunks(), headers=headers, timeout=60), 413)


NO_REQUEST = {
    "nested lists": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"messages": ' + b'{"a": ' * 100_000,
    "not UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "half a surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}], "model": "\\ud800"}',
    "list": b"[]",
    "null": b"null",
    "empty": b"",
    "digits": b"1" * 10_000,
}


@pytest.mark.parametrize("path", [CHAT, "/invocations", "/tokenize", "/v1/responses", "/vtprune/explain"])
def test_bodies_that_are_no_request(server: str, path: str) -> None:
    for name, body in NO_REQUEST.items():
        headers = {"content-type": "application/json"}
        response = httpx.post(server + path, content=body, headers=headers, timeout=60)
        assert 400 <= response.status_code < 500, (name, response.text)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
def test_numbers_that_are_none(server: str, value: str) -> None:
    message = '"messages": [{"role": "user", "content": "what"}]'
    for field in ("temperature", "top_p", "presence_penalty", "max_tokens", "min_p", "seed", "logit_bias"):
        limit = "" if field == "max_tokens" else ', "max_tokens": 2'
        number = f'{{"5": {value}}}' if field == "logit_bias" else value
        body = f'{{"model": "{MODEL_NAME}", {message}, "{field}": {number}{limit}}}'
        headers = {"content-type": "application/json"}
        response = httpx.post(server + CHAT, content=body, headers=headers, timeout=60)
        assert response.status_code < 500, (field, response.text)


def test_headers_of_64_kilobytes(server: str) -> None:
    for headers in (
        {"X-VTPrune-Preset": "x" * 64_000},
        {"X-" + "a" * 60_000: "1"},
        {"X-Request-Id": "i" * 64_000},
    ):
        response = post(server, chat_body(scene()), headers)
        assert response.status_code < 500
        assert len(response.text) < 4000


def test_text_full_of_image_tags(server: str) -> None:
    counted = post(server, chat_body(scene(), question="<image> " * 50 + "what ?"))
    assert counted.status_code == 200, counted.text
    assert counted.json()["usage"]["vtprune"]["vision_tokens"] == 144
    without = post(server, chat_body(question="<image>" * 300))
    assert without.status_code == 200, without.text
    assert without.json()["usage"]["vtprune"]["vision_tokens"] == 0


@pytest.mark.parametrize("tokens", [0, 1, 5, 100, 150])
def test_a_truncation_that_cuts_through_a_picture(server: str, tokens: int) -> None:
    refused(post(server, chat_body(scene(), truncate_prompt_tokens=tokens)))


def test_a_refused_picture_does_not_harm_the_next_to_send_it(server: str) -> None:
    """Front end and engine keep one cache in two halves; a request refused in between must not part them."""
    for tokens in (100, 150):
        refused(post(server, chat_body(noise(70_000 + tokens), truncate_prompt_tokens=tokens)))
        assert post(server, chat_body(noise(70_000 + tokens))).status_code == 200


def test_parts_this_model_does_not_take(server: str) -> None:
    parts: list[dict[str, Any]] = [
        {"type": "video_url", "video_url": {"url": data_url(scene())}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "prompt_embeds", "data": "AAAA"},
        {"type": "image_url", "image_url": {"url": data_url(scene()), "detail": "high", "extra": [[]]}},
    ]
    for part in parts[:-1]:
        refused(post(server, {"model": MODEL_NAME, "messages": [{"role": "user", "content": [part]}]}))
    last = post(
        server, {"model": MODEL_NAME, "max_tokens": 1, "messages": [{"role": "user", "content": parts[-1:]}]}
    )
    assert last.status_code < 500
