# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, against the real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image

from tests.helpers.pictures import scene

if TYPE_CHECKING:
    from tests.playground.browser import Page

pytestmark = [pytest.mark.browser, pytest.mark.engine]

CHAT = "/v1/chat/completions"
EXPLAIN = "/vtprune/explain"


@pytest.fixture
def playground(page: Page, server: str) -> Iterator[Page]:
    """The page just opened; afterwards nothing has left the server's origin or complained in the console."""
    page.console_errors()
    page.open(server)
    yield page
    urls = [request["url"] for request in page.requests()]
    assert [url for url in urls if not url.startswith((f"{server}/", "data:", "blob:"))] == []
    assert page.console_errors() == []


def usage_of(server: str, request: dict[str, Any]) -> dict[str, Any]:
    """Send a chat request of the page again, without it; the `usage` the API answers with."""
    headers = {k: v for k, v in request["headers"].items() if k.lower().startswith("x-vtprune-")}
    answer = httpx.post(server + CHAT, json=request["body"], headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    usage: dict[str, Any] = json.loads(events[-1])["usage"]
    return usage


def explained(server: str, page: Page, **settings: Any) -> dict[str, Any]:
    """What the API itself says of the picture on the page."""
    last = page.requests(EXPLAIN)[-1]["body"]
    body = {"image_url": last["image_url"], "vtprune": {**last["vtprune"], **settings}}
    answer = httpx.post(server + EXPLAIN, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def test_both_answers_carry_the_numbers_of_the_api(playground: Page, server: str) -> None:
    playground.choose_sample(1)
    playground.ask("How many objects?")

    pruned, full = playground.metrics("pruned"), playground.metrics("full")
    sent_pruned, sent_full = playground.requests(CHAT)[-2:]
    for shown, sent in ((pruned, sent_pruned), (full, sent_full)):
        usage = usage_of(server, sent)
        assert shown["vision_tokens"] == usage["vtprune"]["vision_tokens_kept"]
        assert shown["kv_tokens"] == usage["vtprune"]["kv_tokens_kept"]
        assert shown["prompt_tokens"] == usage["prompt_tokens"]
        assert 0 < shown["first_token"] <= shown["total_time"]
    assert pruned["vision_tokens"] == playground.kept < full["vision_tokens"]
    assert full["prompt_tokens"] - pruned["prompt_tokens"] == full["vision_tokens"] - pruned["vision_tokens"]
    assert playground.text("#pruned .answer-text") and playground.text("#full .answer-text")
    assert "fewer vision tokens" in playground.text("#verdict")


def test_slider_moves_the_count_that_the_next_answer_has(playground: Page, server: str) -> None:
    from selenium.webdriver.common.keys import Keys

    playground.choose_sample(2)
    counts = []
    for keys in ([Keys.HOME], [Keys.ARROW_RIGHT] * 30, [Keys.ARROW_RIGHT] * 40, [Keys.END]):
        playground.slide("#aggressiveness", *keys)
        counts.append(playground.kept)
        value = float(playground.find("#aggressiveness").get_attribute("value") or "nan")
        assert counts[-1] == explained(server, playground, aggressiveness=value)["vision_tokens_kept"]
    assert counts[0] == explained(server, playground)["vision_tokens"]
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[1]

    playground.ask("Is there a red cross?")
    assert playground.metrics("pruned")["vision_tokens"] == counts[-1]


@pytest.mark.parametrize("method", ["random", "topk", "prumerge"])
def test_method_is_the_one_the_request_names(playground: Page, server: str, method: str) -> None:
    playground.select("#method", method)
    kept = playground.kept
    assert kept == explained(server, playground, method=method)["vision_tokens_kept"]
    playground.ask()
    assert playground.metrics("pruned")["vision_tokens"] == kept
    assert playground.requests(CHAT)[-2]["headers"]["X-VTPrune-Method"] == method


def test_picture_of_ones_own_with_its_crop(playground: Page, server: str, tmp_path: Path) -> None:
    picture = Image.new("RGB", (900, 300), (110, 120, 130))
    picture.paste(scene(), (360, 60))
    picture.save(tmp_path / "wide.png")
    playground.choose_file(tmp_path / "wide.png")
    playground.wait(lambda: "wide.png" in (playground.find("#overlay").get_attribute("aria-label") or ""))

    kept = playground.kept
    answer = explained(server, playground)
    assert kept == answer["vision_tokens_kept"]
    assert answer["image_size"] == [900, 300]
    assert answer["crop"]["width"] == pytest.approx(1 / 3, abs=0.01)
    assert "outside the square that the vision tower sees" in playground.text("#legend")


def test_file_that_is_no_picture_is_said_to_be_none(playground: Page, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    before = playground.kept
    playground.choose_file(tmp_path / "broken.png")
    playground.wait(lambda: playground.text("#explain-error"))
    assert playground.text("#explain-error") == "broken.png is not a picture that this browser can read."
    assert playground.kept == before


def test_kv_slider_follows_the_server(playground: Page, server: str) -> None:
    layer = httpx.get(f"{server}/vtprune/config").json()["model"]["prune_layer"]
    assert playground.find("#kv-keep").is_enabled() == (layer is not None)
    assert ("no prune layer" in playground.text("#kv-hint")) == (layer is None)


def test_curve_and_picture_name_the_same_patch(playground: Page, server: str) -> None:
    from selenium.webdriver.common.keys import Keys

    answer = explained(server, playground)
    playground.find("#overlay").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    patch = answer["grid"][1] + 1
    rank = answer["order"].index(patch) + 1
    fate = "kept" if answer["kept"][patch] else "dropped"
    readout = playground.text("#readout")
    assert readout.startswith(f"Patch in row 2, column 2: rank {rank}, ")
    assert readout.endswith(f" {answer['scores'][patch]:.3f}, {fate}.")
    assert f": rank {answer['cut']}" in playground.text("#curve")


def test_server_refusal_is_shown_as_its_sentence(page: Page, server: str) -> None:
    page.open(server)
    page.fill("#max-tokens", "100000")
    page.ask()
    sent = page.requests(CHAT)[-1]
    refusal = httpx.post(server + CHAT, json=sent["body"], headers={"X-VTPrune-Preset": "off"}, timeout=60)
    assert refusal.status_code == 400
    assert page.text("#full .error") == page.text("#pruned .error") == refusal.json()["error"]["message"]
    page.console_errors()  # the browser itself notes the two refusals there
