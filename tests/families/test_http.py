# SPDX-License-Identifier: Apache-2.0
"""The contract at the front door, the same for every family: `vtprune serve`, a real engine, real HTTP.

One server in `make test`; VTPRUNE_TEST_FAMILIES=all, or names in `family_checkpoints.CHECKPOINTS` separated
by commas, starts one for each. What of it depends on the family is tested for all of them without a server
(`test_offers`, `test_explain`, `test_placeholders`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import httpx
import pytest
from PIL import Image

from tests.conftest import MODEL_NAME, start_server, stop_server
from tests.families.conftest import Checkpoint, chosen
from tests.families.test_offers import tells_what_it_offers
from tests.helpers.client import answer, chat_body, counts, post, streamed
from tests.helpers.family_cases import CLIP, LANDSCAPE, PORTRAIT, SMALL
from tests.helpers.pictures import data_url
from vllm_vtprune.families.base import Family
from vllm_vtprune.families.registry import family_of
from vllm_vtprune.vision.features import servable_methods

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

#: Three-dimensional positions, deepstack and videos; LLaVA is the demo model's, in tests/server.
SERVED = chosen(["qwen3_vl"])
QUARTER = {"X-VTPrune-Keep-Ratio": "0.25"}


@dataclass(frozen=True)
class Served:
    """A server, and the adapter of the checkpoint it serves."""

    url: str
    family: Family


@pytest.fixture(scope="module", params=SERVED)
def served(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from vllm.transformers_utils.config import get_config

    folder = checkpoint(request.param)
    config = get_config(str(folder), trust_remote_code=True)
    flags = {
        "--served-model-name": MODEL_NAME,
        "--max-model-len": "1024",
        "--max-num-seqs": "4",
        "--max-num-batched-tokens": "1024",
        "--dtype": "float32",
        "--limit-mm-per-prompt": json.dumps({"image": 4, "video": 2}),
        "--prune-layer": "3",
    }
    arguments = [part for flag in flags.items() for part in flag]
    server = start_server(
        tmp_path_factory.mktemp(request.param) / "server.log",
        *(str(folder), "--enforce-eager", "--trust-remote-code", *arguments),
        env={"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    )
    yield Served(server.url, family_of(config))
    stop_server(server)


def explain(served: Served, image: Image.Image, headers: dict[str, str]) -> dict[str, Any]:
    response = post(served.url, {"image_url": data_url(image)}, headers, path="/vtprune/explain")
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    return told


def prompt_tokens(response: httpx.Response) -> int:
    return int(response.json()["usage"]["prompt_tokens"])


@pytest.mark.parametrize("image", [LANDSCAPE, PORTRAIT, SMALL], ids=["landscape", "portrait", "small"])
def test_a_picture_is_pruned_as_asked(served: Served, image: Image.Image) -> None:
    """Tokens that stand for no unit (breaks, tags) stay, so the prompt loses what the picture loses."""
    whole, pruned = post(served.url, chat_body(image)), post(served.url, chat_body(image), QUARTER)
    before, after = counts(whole), counts(pruned)
    assert before["vision_tokens"] == before["vision_tokens_kept"] == after["vision_tokens"]
    assert after["vision_tokens_kept"] < before["vision_tokens"]
    lost = before["vision_tokens"] - after["vision_tokens_kept"]
    assert prompt_tokens(pruned) == prompt_tokens(whole) - lost
    assert after["kv_tokens"] == after["kv_tokens_kept"] == prompt_tokens(pruned)


def test_several_pictures_each_have_their_count(served: Served) -> None:
    alone = [counts(post(served.url, chat_body(image), QUARTER)) for image in (LANDSCAPE, PORTRAIT, SMALL)]
    together = counts(post(served.url, chat_body(LANDSCAPE, PORTRAIT, SMALL), QUARTER))
    for name in ("vision_tokens", "vision_tokens_kept"):
        assert together[name] == sum(one[name] for one in alone)


def video_body(*parts: Any, **fields: Any) -> dict[str, Any]:
    """About pictures and videos, in their order; a video is a list of pictures, or a URL."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, Image.Image):
            content.append({"type": "image_url", "image_url": {"url": data_url(part)}})
            continue
        url = part
        if not isinstance(part, str):
            frames = [data_url(frame, "JPEG").partition(",")[2] for frame in part]
            url = "data:video/jpeg;base64," + ",".join(frames)
        content.append({"type": "video_url", "video_url": {"url": url}})
    body = chat_body(**fields)
    body["messages"][0]["content"] = [*content, *body["messages"][0]["content"]]
    return body


@pytest.fixture
def films(served: Served) -> Served:
    if "video" not in served.family.modalities:
        pytest.skip("a family whose videos are not pruned")
    return served


@pytest.mark.parametrize("method", ["inflection", "inflection_temporal"])
def test_a_video_is_pruned_as_asked(films: Served, method: str) -> None:
    """Its vision tokens are counted, beside those of a picture."""
    film = [Image.fromarray(frame) for frame in CLIP[0]]
    headers = {**QUARTER, "X-VTPrune-Method": method}
    picture = counts(post(films.url, video_body(SMALL), headers))
    whole, pruned = (post(films.url, video_body(film, SMALL, film), h) for h in ({}, headers))
    alone = counts(post(films.url, video_body(film), headers))
    before, after = counts(whole), counts(pruned)
    assert before["vision_tokens"] == before["vision_tokens_kept"] == after["vision_tokens"]
    for name in ("vision_tokens", "vision_tokens_kept"):
        assert after[name] == picture[name] + 2 * alone[name]
    assert alone["vision_tokens_kept"] < alone["vision_tokens"] // 2
    lost = before["vision_tokens"] - after["vision_tokens_kept"]
    assert prompt_tokens(pruned) == prompt_tokens(whole) - lost


def test_a_file_of_a_video_is_pruned(films: Served, tmp_path: Path) -> None:
    height, width = CLIP[0].shape[1:3]
    file = cv2.VideoWriter(str(tmp_path / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 2.0, (width, height))
    for frame in CLIP[0]:
        file.write(frame)
    file.release()
    content = base64.b64encode((tmp_path / "film.mp4").read_bytes()).decode()
    usage = counts(post(films.url, video_body(f"data:video/mp4;base64,{content}"), QUARTER))
    assert 0 < usage["vision_tokens_kept"] < usage["vision_tokens"] // 2


def test_a_bad_video_is_a_400_that_says_what_to_send(films: Served) -> None:
    film = [Image.fromarray(frame) for frame in CLIP[0]]
    for body, sentence in (
        (video_body(film[:1]), "has 1 frame"),
        (video_body("data:video/mp4;base64,AAAA"), "The video could not be decoded"),
        (video_body(data_url(film[0])), "A data: URL in video_url must declare a video type"),
        (video_body("http://127.0.0.1/film.mp4"), "video_url leads to a private"),
    ):
        response = post(films.url, body, QUARTER)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert sentence in error["message"] and error["param"] == "video_url", error
    assert post(films.url, video_body(film), QUARTER).status_code == 200


def test_both_stages_count(served: Served) -> None:
    response = post(served.url, chat_body(LANDSCAPE), {**QUARTER, "X-VTPrune-KV-Keep": "0.5"})
    usage = counts(response)
    assert usage["kv_tokens"] == prompt_tokens(response) > usage["kv_tokens_kept"] >= usage["kv_tokens"] // 2


def test_a_stream_carries_the_same_numbers_and_words(served: Served) -> None:
    plain = post(served.url, chat_body(PORTRAIT), QUARTER)
    body = chat_body(PORTRAIT, stream=True, stream_options={"include_usage": True})
    with httpx.stream(
        "POST", f"{served.url}/v1/chat/completions", json=body, headers=QUARTER, timeout=60
    ) as stream:
        text, usage = streamed(stream)
    assert text == answer(plain)
    assert usage["vtprune"] == counts(plain)


def test_text_alone_is_not_touched(served: Served) -> None:
    usage = counts(post(served.url, chat_body(), QUARTER))
    assert usage["vision_tokens"] == usage["vision_tokens_kept"] == 0


@pytest.mark.parametrize(
    "headers", [{}, QUARTER, {"X-VTPrune-Aggressiveness": "0.5"}, {"X-VTPrune-Preset": "balanced"}]
)
def test_it_explains_what_serving_does(served: Served, headers: dict[str, str]) -> None:
    """Every view, its units, and among them those that stay."""
    for image in (LANDSCAPE, PORTRAIT):
        told = explain(served, image, headers)
        usage = counts(post(served.url, chat_body(image), headers))
        assert told["vision_tokens"] == usage["vision_tokens"]
        assert told["vision_tokens_kept"] == usage["vision_tokens_kept"]
        assert told["score"] == served.family.default_score
        views = [told, *told["more_views"]]
        for view in views:
            rows, columns = view["grid"]
            assert len(view["kept"]) == len(view["scores"]) == len(view["curve"]) == rows * columns
            crop = view["crop"]
            assert 0 <= crop["left"] <= crop["left"] + crop["width"] <= 1 + 1e-6
            assert 0 <= crop["top"] <= crop["top"] + crop["height"] <= 1 + 1e-6
        # the places that are no unit's, newlines, all stay
        units = sum(len(view["kept"]) for view in views)
        kept = sum(sum(view["kept"]) for view in views)
        assert usage["vision_tokens"] - units == usage["vision_tokens_kept"] - kept >= 0


def test_config_tells_what_the_family_offers(served: Served) -> None:
    tells_what_it_offers(httpx.get(f"{served.url}/vtprune/config", timeout=30).json(), served.family)


def test_a_method_that_the_tower_cannot_serve_is_a_400_that_names_those_it_can(served: Served) -> None:
    from vllm_vtprune.selection.registry import METHODS

    for method in METHODS:
        response = post(served.url, chat_body(SMALL), {**QUARTER, "X-VTPrune-Method": method})
        if method in servable_methods(served.family):
            assert response.status_code == 200, (method, response.text)
        else:
            assert response.status_code == 400, method
            assert method in response.json()["error"]["message"]
            assert "inflection" in response.json()["error"]["message"]
